"""Pushes of what changed to a real engine: when all bytes are sent, and that a wrong base is refused."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from areal_like.errors import WeightSyncError
from areal_like.wire.messages.weights import PushWeights
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.checks import check_base, check_push
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.adapter_pushes import Server, push, pushing, serving
from tests.support.engine_harness import (
    Engine,
    load_model,
    reference_logprobs,
    running_engine,
    sample,
    save_model,
    weights_of,
)
from tests.support.snapshots import Held
from trainer.weights.broadcaster import PushOutcome

PROMPT = [5, 17, 3]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = save_model(tmp_path_factory.mktemp("deltas") / "model", "llama")
    with running_engine(path) as running:
        yield running


@asynccontextmanager
async def server_of(engine: Engine, name: str = "rollout-0") -> AsyncIterator[Server]:
    def fail(reason: str) -> None:
        raise AssertionError(reason)

    strategy = ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=fail)
    async with engine.client() as client, serving(client, strategy, base="", name=name) as server:
        yield server


class Pushed:
    """Weights of which every push changes a few."""

    def __init__(self, engine: Engine) -> None:
        self.tensors = weights_of(engine.path)
        self.snapshot: Held | None = None

    def train(self, *, step: int) -> Held:
        """Takes the next snapshot; the senders keep the one before."""
        for number, tensor in enumerate(self.tensors.values()):
            if number % 3:
                tensor.view(-1)[step % 30 :: 30].mul_(1.5)
        before = self.snapshot
        self.snapshot = Held(self.tensors, bucket_bytes=4096, pushed_before=before)
        return self.snapshot


def whole(outcome: PushOutcome, snapshot: Held) -> bool:
    """True if all bytes were sent and nothing compared; False if only what differs was."""
    num_bytes = sum(bucket.num_bytes for bucket in snapshot.buckets)
    sent = outcome.traffic
    if sent.num_compared:
        assert sent.whole_bytes == 0 and 0 < sent.delta_bytes < num_bytes / 5
        assert 0.01 < sent.num_changed / sent.num_compared < 0.05
        return False
    assert sent.whole_bytes == num_bytes and not sent.delta_bytes
    return True


async def check_engine(server: Server, engine: Engine, pushed: Pushed, *, version: int) -> None:
    """The engine samples with exactly these weights."""
    model = load_model(engine.path)
    model.load_state_dict(pushed.tensors, strict=False)
    generation = await sample(server.client, PROMPT, 12)
    assert set(generation.versions.tolist()) == {version}
    expected = reference_logprobs(model, PROMPT, generation.output_ids.tolist())
    assert abs(expected - generation.logprobs).max() < TOLERANCE


def test_all_bytes_are_sent_unless_every_member_has_the_base(engine: Engine) -> None:
    async def body() -> None:
        pushed, version = Pushed(engine), 0

        async def push_next(*servers: Server) -> bool:
            nonlocal version
            version += 1
            snapshot = pushed.train(step=version)
            outcome = await push(broadcaster, snapshot, *servers, version=version)
            assert set(outcome.activated) == {server.name for server in servers}, outcome.failed
            await check_engine(servers[0], engine, pushed, version=version)
            return whole(outcome, snapshot)

        async with server_of(engine) as server:
            async with pushing() as broadcaster:
                assert [await push_next(server) for _ in range(3)] == [True, False, False]
                # One more was pushed meanwhile, to other servers: its bytes are kept, and these have others.
                pushed.train(step=99)
                assert [await push_next(server) for _ in range(2)] == [True, False]
            # The trainer ends, and another resumes from its checkpoint, with other weights.
            pushed.snapshot = None
            async with pushing(integrity="none") as broadcaster:
                assert [await push_next(server) for _ in range(2)] == [True, False]
                # The engine gets other weights in another way: it refuses the delta, and keeps them.
                await server.client.update_weights_from_disk(
                    str(engine.path), weight_version=version, timeout_s=30.0
                )
                version += 1
                snapshot = pushed.train(step=version)
                outcome = await push(broadcaster, snapshot, server, version=version)
                assert not outcome.activated
                assert "what it has cannot be the base of a push" in outcome.failed[server.name]
                initial = Pushed(engine)
                await check_engine(server, engine, initial, version=version - 1)
            async with pushing() as broadcaster:
                assert [await push_next(server) for _ in range(2)] == [True, False]
                # The sender's base has other bytes than it pushed, so a change is not sent.
                version += 1
                before, snapshot = pushed.snapshot, pushed.train(step=version)
                assert before is not None
                before._data[2] = snapshot._data[2]
                outcome = await push(broadcaster, snapshot, server, version=version)
                assert not outcome.activated and "bucket 2 of" in outcome.failed[server.name]
                assert "checksum is wrong" in outcome.failed[server.name]
            async with pushing() as broadcaster:
                assert [await push_next(server) for _ in range(2)] == [True, False]

    asyncio.run(body())


def test_a_push_names_both_version_and_digest_of_its_base() -> None:
    digest = "ab" * 32
    request = PushWeights(
        epoch=1,
        group_name="g",
        version=8,
        step=8,
        update_mode="recompute",
        manifest={},
        integrity="none",
        timeout_s=9.0,
    )
    check_push(request, integrity="none")
    check_base(request, version=7, base_digest="")
    request = dataclasses.replace(request, base_version=7, base_digest=digest)
    check_push(request, integrity="none")
    check_base(request, version=7, base_digest=digest)
    for version, other in ((6, digest), (7, "cd" * 32)):
        with pytest.raises(WeightSyncError, match=r"differs from version 7 \(abab.*engine has version"):
            check_base(request, version=version, base_digest=other)
    with pytest.raises(WeightSyncError, match="needs all weights"):
        check_base(request, version=7, base_digest="")
    for change in ({"base_version": -1}, {"base_digest": ""}, {"base_digest": "x"}):
        with pytest.raises(WeightSyncError, match="base_digest"):
            check_push(dataclasses.replace(request, **change), integrity="none")  # type: ignore[arg-type]
