"""Adapters alone pushed into embedded engines: real broadcasts, digests, failures and joins."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from areal_like.trajectory import FinishReason
from areal_like.weights.adapters import AdapterHeader, adapter_shapes, linear_layers
from areal_like.weights.buckets import TensorSpec, spec_of
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.adapter_pushes import Server, Spoiled, held, push, pushing, serving
from tests.support.adapters import TARGETS, PeftAdapter, make_adapter
from tests.support.engine_conformance import PROMPT
from tests.support.engine_harness import (
    TOLERANCE,
    Engine,
    engine_process,
    error_of,
    load_model,
    reference_logprobs,
    running_engine,
    sample,
    save_model,
    weights_of,
)
from tests.support.quick import only_in_chaos
from tests.support.snapshots import Held
from trainer.weights.broadcaster import Broadcaster

NUM_TOKENS = 1500
Body = Callable[[Broadcaster, Server], Awaitable[None]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(path: Path) -> list[PeftAdapter]:
    return [make_adapter(path, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with running_engine(path, max_adapters=3) as engine:
        yield engine


@contextlib.contextmanager
def engine_that_is_killed(path: Path) -> Iterator[Engine]:
    with engine_process(path, max_adapters=2) as (process, url):
        yield Engine(url=url, path=path, pid=process.pid)


def updates(gate: GenerationGate | None = None) -> ShadowWeightUpdate:
    def fail(reason: str) -> None:
        raise AssertionError(reason)

    return ShadowWeightUpdate(gate=gate or GenerationGate(), on_untrusted=fail)


def run(engine: Engine, adapters: list[PeftAdapter], body: Body, **settings: object) -> None:
    async def main() -> None:
        async with (
            engine.client() as client,
            serving(client, updates(), base=adapters[0].header.base) as server,
            pushing(**settings) as broadcaster,
        ):
            await body(broadcaster, server)

    asyncio.run(main())


async def begun(client: EngineClient, num_tokens: int) -> asyncio.Future[Generation]:
    """Starts a sample; returns once it has tokens."""
    before = (await client.load())["generated_tokens"]
    running = asyncio.ensure_future(sample(client, PROMPT, num_tokens))
    while (await client.load())["generated_tokens"] == before:
        await asyncio.sleep(0.01)
    return running


async def check(client: EngineClient, adapter: PeftAdapter, *, version: int) -> None:
    """Checks that new samples come from this adapter."""
    generation = await sample(client, PROMPT, 12)
    assert set(generation.versions.tolist()) == {version}
    assert error_of(adapter.model, PROMPT, generation) < TOLERANCE


@pytest.mark.parametrize("mode", ["recompute", "keep", *only_in_chaos("abort_resume", "drain")])
def test_samples_finish_or_change_as_the_mode_says(
    engine: Engine, adapters: list[PeftAdapter], mode: str
) -> None:
    async def body(broadcaster: Broadcaster, server: Server) -> None:
        client = server.client
        first = await client.weight_version() + 1
        outcome = await push(broadcaster, held(adapters[0]), server, version=first)
        assert outcome.activated.keys() == {"rollout-0"}
        await check(client, adapters[0], version=first)
        running = await begun(client, NUM_TOKENS)
        await client.pause("in_place")  # so that it does not end before the push
        outcome = await push(broadcaster, held(adapters[1]), server, version=first + 1)
        assert outcome.activated.keys() == {"rollout-0"}
        await client.resume()
        await check(client, adapters[1], version=first + 1)
        generation = await running
        versions, tokens = generation.versions.tolist(), generation.output_ids.tolist()
        num_first = versions.count(first)
        assert versions == sorted(versions)
        if mode == "abort_resume":
            assert generation.finish_reason is FinishReason.ABORT and set(versions) == {first}
            return
        assert len(versions) == NUM_TOKENS
        assert num_first == NUM_TOKENS if mode == "drain" else 0 < num_first < NUM_TOKENS
        wants = [reference_logprobs(adapter.model, PROMPT, tokens) for adapter in adapters[:2]]
        differences = np.abs(
            generation.logprobs - np.concatenate((wants[0][:num_first], wants[1][num_first:]))
        )
        assert differences[:num_first].max() < TOLERANCE
        if mode == "recompute":
            assert differences.max() < TOLERANCE

    run(engine, adapters, body, update_mode=mode)


@pytest.mark.parametrize("changes", ["bytes", "bytes and checksum"])
def test_a_corrupted_bucket_is_refused(engine: Engine, adapters: list[PeftAdapter], changes: str) -> None:
    async def body(broadcaster: Broadcaster, server: Server) -> None:
        version = await server.client.weight_version() + 1
        await push(broadcaster, held(adapters[0]), server, version=version)
        outcome = await push(broadcaster, Spoiled(adapters[1], changes=changes), server, version=version + 1)
        what = "checksum" if changes == "bytes" else "SHA-256"
        assert (
            f"bucket 1 of {len(held(adapters[1]).buckets)}: the {what} is wrong"
            in outcome.failed["rollout-0"]
        )
        await check(server.client, adapters[0], version=version)

    run(engine, adapters, body)


def test_a_trainer_that_dies_in_mid_push_leaves_the_old_adapter(
    engine: Engine, adapters: list[PeftAdapter]
) -> None:
    """Its group breaks after the first bucket; the next trainer pushes through a new one."""

    async def body(broadcaster: Broadcaster, server: Server) -> None:
        version = await server.client.weight_version() + 1
        await push(broadcaster, held(adapters[0]), server, version=version)
        running = await begun(server.client, 200)
        (session,) = broadcaster._sessions.values()
        outcome = await push(
            broadcaster, Spoiled(adapters[1], on_read=session.group.close), server, version=version + 1
        )
        assert outcome.failed and not outcome.activated
        assert set((await running).versions.tolist()) == {version}
        await check(server.client, adapters[0], version=version)
        async with pushing() as successor:
            outcome = await push(successor, held(adapters[2]), server, version=version + 2)
            assert outcome.activated.keys() == {"rollout-0"}
        await check(server.client, adapters[2], version=version + 2)

    run(engine, adapters, body)


def test_a_new_engine_gets_the_newest_adapter(path: Path, adapters: list[PeftAdapter]) -> None:
    """An engine is killed in mid-push. Its successor starts with the base and is equal after one push."""
    header = adapters[0].header

    async def main() -> None:
        async with pushing() as broadcaster:
            with engine_that_is_killed(path) as engine:
                async with engine.client() as client, serving(client, updates(), base=header.base) as server:
                    await push(broadcaster, held(adapters[0]), server, version=1)
                    kill = Spoiled(adapters[1], on_read=lambda: os.kill(engine.pid, signal.SIGKILL))
                    outcome = await push(broadcaster, kill, server, version=2)
                    assert not outcome.activated
            with running_engine(path, max_adapters=2) as engine:
                async with (
                    engine.client() as client,
                    serving(client, updates(), base=header.base, name="rollout-1") as server,
                ):
                    generation = await sample(client, PROMPT, 12)
                    assert set(generation.versions.tolist()) == {0}
                    assert error_of(load_model(path), PROMPT, generation) < TOLERANCE
                    outcome = await push(broadcaster, held(adapters[1]), server, version=3)
                    assert outcome.activated.keys() == {"rollout-1"}
                    await check(client, adapters[1], version=3)

    asyncio.run(main())


def test_pushes_that_do_not_belong_to_the_engine_are_refused(
    engine: Engine, adapters: list[PeftAdapter], path: Path, tmp_path: Path
) -> None:
    """An adapter of another base, or whole weights where adapters are expected, and the other way around."""
    other = make_adapter(save_model(tmp_path / "other", "llama", seed=9), seed=1)

    async def main() -> None:
        for base, snapshot, message in (
            (adapters[0].header.base, held(other), "another base model"),
            (adapters[0].header.base, Held(weights_of(path), bucket_bytes=1 << 20), "pushes all weights"),
            ("", held(adapters[0]), "pushes an adapter"),
        ):
            async with (
                engine.client() as client,
                serving(client, updates(), base=base) as server,
                pushing() as broadcaster,
            ):
                outcome = await push(broadcaster, snapshot, server, version=1 << 20)
                assert message in outcome.failed["rollout-0"]

    asyncio.run(main())


def num_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(TensorSpec(name=n, dtype="bfloat16", shape=s).num_bytes for n, s in shapes.items())


def test_an_adapter_is_a_few_hundredths_of_all_weights(path: Path, adapters: list[PeftAdapter]) -> None:
    """SmolLM2-135M's shapes with rank 8 on every linear layer: under 2 % of a full push in the same dtype."""
    hidden, kv, inner, vocab = 576, 192, 1536, 49152
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(30):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 134_515_008  # as published
    header = AdapterHeader(rank=8, alpha=16, targets=TARGETS, base="0" * 64)
    fraction = num_bytes(adapter_shapes(header, linear_layers(shapes))) / num_bytes(shapes)
    assert 0.017 < fraction < 0.02

    # What a push of the tiny model carries is what the shapes say.
    measured = sum(bucket.num_bytes for bucket in held(adapters[0]).buckets)
    base_shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(path).items()}
    assert measured == 2 * num_bytes(adapter_shapes(adapters[0].header, linear_layers(base_shapes)))
    whole = sum(spec_of(name, tensor).num_bytes for name, tensor in weights_of(path).items())
    assert measured < whole
