"""A mixture-of-experts model on a real SGLang: log-probs, pushes of expert tensors by name, a whole job."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from areal_like.config import from_mapping
from areal_like.weights.buckets import spec_of
from rollout_server.policy.engines.sglang.process import SglangProcess, find_python
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.sglang.conftest import START_S
from tests.support import engine_conformance as conformance
from tests.support.engine_harness import CONTEXT, VOCAB, Engine, save_models, weights_of
from tests.support.moe_model import run_moe_job

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


def test_pushed_experts_are_used(tmp_path: Path) -> None:
    models = save_models(tmp_path / "models", "qwen3_moe")
    pushed = weights_of(models[1])
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in pushed
    CheckpointShapes.of(str(models[0])).check([spec_of(name, t) for name, t in pushed.items()])
    config = from_mapping(
        {
            "runs_dir": str(tmp_path / "runs"),
            "model": {"path": str(models[0])},
            "rollout": {"engine": "sglang", "max_running": 16, "start_timeout_s": START_S},
        }
    )
    process = SglangProcess(
        config,
        name="rollout-0",
        model=str(models[0]),
        context_tokens=CONTEXT,
        max_positions=CONTEXT,
        vocab_size=VOCAB,
    )

    async def check() -> None:
        client = await process.start(version=0)
        async with client:
            engine = Engine(url=client.base_url, path=models[0], kind="sglang", api_key=process.api_key)
            await conformance.logprobs_and_greedy_match_transformers(engine, models)
            assert process.is_running

    try:
        asyncio.run(check())
    finally:
        asyncio.run(process.stop())


def test_a_job_on_sglang(tmp_path: Path) -> None:
    run_moe_job(
        tmp_path,
        "rollout.engine=sglang",
        f"rollout.sglang.python={find_python('')}",
        f"rollout.start_timeout_s={START_S}",
        num_steps=6,
    )
