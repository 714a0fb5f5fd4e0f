"""A push into an SGLang of two tensor-parallel ranks: each is a rank of the weight group."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from areal_like.config import Config
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.sglang.process import SglangProcess
from rollout_server.policy.sglang_client import SglangClient
from tests.sglang.test_sglang_update import UpdateHarness
from tests.support.engine_harness import CONTEXT, VOCAB, Models, load_model, weights_of

pytestmark = [pytest.mark.timeout(480), pytest.mark.long]


@pytest.fixture
def two_ranks(config: Config, models: Models) -> Iterator[SglangProcess]:
    # Without the variable SGLang wants a NUMA node for each rank.
    sglang = replace(config.rollout.sglang, env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})
    process = SglangProcess(
        replace(config, rollout=replace(config.rollout, sglang=sglang, gpus_per_engine=2)),
        name="rollout-1",
        model=str(models[0]),
        context_tokens=CONTEXT,
        max_positions=CONTEXT,
        vocab_size=VOCAB,
    )
    yield process
    asyncio.run(process.stop())


def test_both_ranks_get_the_new_weights(two_ranks: SglangProcess, models: Models) -> None:
    async def body() -> None:
        client: EngineClient = await two_ranks.start(version=0)
        async with client:
            assert isinstance(client, SglangClient)
            assert client.info.num_ranks == 2 and client.info.loads_in_place
            harness = UpdateHarness(client=client, models=models)
            await harness.start()
            await harness.check(load_model(models[0]), version=0)
            await harness.push(weights_of(models[1]))
            await harness.check(load_model(models[1]), version=1)

    asyncio.run(body())
