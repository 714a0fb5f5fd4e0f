"""Pushes into a real SGLang by a rollout server's code: the four update modes, and each way to fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from areal_like.config import Config, SglangConfig
from areal_like.errors import EngineError, WeightSyncError
from areal_like.weights.buckets import Bucket, Manifest, cut_buckets, flatten, spec_of
from areal_like.weights.integrity import BucketSums
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.messages.weights import PushWeights
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards, Turns
from rollout_server.policy.engines.sglang.process import SglangAtUrl
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import SglangClient
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from rollout_server.weights.in_place import SglangWeightUpdate
from rollout_server.weights.strategy import WeightPush
from tests.support.engine_conformance import PROMPT, until_running
from tests.support.engine_harness import (
    CONTEXT,
    TOLERANCE,
    VOCAB,
    Engine,
    Models,
    Pusher,
    error_of,
    form_group,
    load_model,
    reference_logprobs,
    sample,
    weights_of,
)
from tests.support.waiting import HANG_LIMIT_S

pytestmark = pytest.mark.timeout(480)

BUCKET_BYTES = 1 << 14
NAME = "model.layers.1.mlp.up_proj.weight"
INITIAL = 0


@dataclass(eq=False)
class UpdateHarness:
    """Both ends of weight updates: the SglangWeightUpdate of a server (without the server), and rank 0."""

    client: SglangClient
    models: Models
    version: int = INITIAL
    gate: GenerationGate = field(default_factory=GenerationGate)
    quarantined: list[int] = field(default_factory=list)
    doubted: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.update = SglangWeightUpdate(
            shapes=CheckpointShapes.of(str(self.models[0])),
            gate=self.gate,
            on_quarantine=lambda reason, version: self.quarantined.append(version),
            on_untrusted=self.doubted.append,
        )
        await self.client.update_weights_from_disk(str(self.models[0]), weight_version=INITIAL, timeout_s=60)
        await self.update.engine_started(self.client, path=str(self.models[0]), version=INITIAL)

    async def push(
        self,
        tensors: Mapping[str, Tensor],
        *,
        mode: str = "recompute",
        num_sent: int | None = None,
        hangs: bool = False,
    ) -> float:
        """Pushes the next version; after `num_sent` buckets the sender leaves the group, or `hangs`."""
        buckets = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=BUCKET_BYTES)
        assert len(buckets) > 2
        world_size = 1 + self.client.info.num_ranks
        with WeightGroup.create(world_size=world_size, group_name="updates", timeout_s=30) as group:
            joining = self.client.init_weights_group(
                form_group("updates", port=group.port, timeout_s=20, world_size=world_size)
            )
            await asyncio.gather(joining, asyncio.to_thread(group.connect))
            sending = asyncio.create_task(
                asyncio.to_thread(_send, group, buckets[:num_sent], tensors, leaves=not hangs)
            )
            try:
                return await self._receive(buckets, mode=mode, timeout_s=3 if hangs else 30)
            finally:
                group.close()
                with contextlib.suppress(EngineError):
                    await self.client.destroy_weights_group(group_name="updates")
                await asyncio.wait([sending])

    async def _receive(self, buckets: tuple[Bucket, ...], *, mode: str, timeout_s: float) -> float:
        manifest = Manifest(version=self.version + 1, buckets=buckets)
        request = PushWeights(
            epoch=1,
            group_name="updates",
            version=self.version + 1,
            step=1,
            update_mode=mode,
            manifest=manifest.to_dict(),
            integrity="none",
            timeout_s=timeout_s,
        )
        async with asyncio.timeout(timeout_s):
            push = WeightPush(
                request=request,
                manifest=manifest,
                left_s=lambda: 2 * timeout_s,
                cancellable=_nothing,
                ready=lambda: None,
                sent_sums=_no_sums,
            )
            stall_s = await self.update.push(self.client, push)
        self.version += 1
        return stall_s

    async def check(self, model: Any, *, version: int) -> None:
        """Checks that the engine serves these weights under this version."""
        assert await self.client.weight_version() == version
        generation = await asyncio.wait_for(sample(self.client, PROMPT, 12), HANG_LIMIT_S)
        assert set(generation.versions.tolist()) == {version}
        assert error_of(model, PROMPT, generation) < TOLERANCE


def _send(
    group: WeightGroup, buckets: tuple[Bucket, ...], tensors: Mapping[str, Tensor], *, leaves: bool
) -> None:
    with contextlib.suppress(WeightSyncError):
        for bucket in buckets:
            group.broadcast(flatten(bucket, tensors))
        if leaves:
            group.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


async def _no_sums() -> BucketSums:
    raise AssertionError("SGLang compares no sums")


@asynccontextmanager
async def harness_of(engine: Engine, models: Models) -> AsyncIterator[UpdateHarness]:
    async with engine.client() as client:
        assert isinstance(client, SglangClient)
        harness = UpdateHarness(client=client, models=models)
        await harness.start()
        yield harness
        # After `keep` the prefix cache holds KV of mixed versions.
        while True:
            try:
                await client.flush_cache()
                return
            except EngineError:  # refused while a sequence is still ending
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("mode", ["recompute", "keep", "abort_resume", "drain"])
def test_push_while_sequences_run(engine: Engine, models: Models, mode: str) -> None:
    references = [load_model(path) for path in models]
    new_weights = weights_of(models[1])

    async def body() -> None:
        async with harness_of(engine, models) as harness:
            sampling = Sampling(max_new_tokens=500, ignore_eos=True)
            samples = [
                Turns(PolicyClient(harness.client, sampling=sampling, rid=f"{mode}{i}", gate=harness.gate))
                for i in range(6)
            ]
            sampling_all = asyncio.gather(
                *(one.sample(np.asarray([*PROMPT, i], np.int32)) for i, one in enumerate(samples))
            )
            await until_running(harness.client, 6)
            stall_s = await harness.push(new_weights, mode=mode)
            assert 0 < stall_s < 30 and not harness.quarantined and not harness.doubted
            await harness.check(references[1], version=1)
            await asyncio.wait_for(sampling_all, HANG_LIMIT_S)
            old_and_new, kept_errors = set(), []
            for one in samples:
                trajectory = one.to_trajectory(SampleRewards())
                tokens, sampled = trajectory.tokens.tolist(), trajectory.loss_mask == 1
                assert sampled.sum() == 500
                versions = trajectory.versions[sampled]
                old_and_new.add(tuple(sorted(set(versions.tolist()))))
                for version, model in enumerate(references):
                    mine = versions == version
                    errors = np.abs(
                        reference_logprobs(model, tokens[:5], tokens[5:]) - trajectory.logprobs[sampled]
                    )[mine]
                    if mode == "keep" and version == 1:
                        kept_errors.append(errors.max())
                    else:
                        assert not mine.any() or errors.max() < TOLERANCE
            assert old_and_new == ({(0,)} if mode == "drain" else {(0, 1)})
            assert mode != "keep" or max(kept_errors) > TOLERANCE, (
                "old KV under new weights gives wrong log-probs; if not, KV was recomputed"
            )

    asyncio.run(body())


def test_keep_shares_prefixes_only_within_one_version(engine: Engine, models: Models) -> None:
    """New requests compute their prompt under the new weights, those of an older sample use its prefix."""
    references = [load_model(path) for path in models]
    prompt = [*range(20, 99), *PROMPT]  # shares no prefix with the running one

    async def body() -> None:
        async with harness_of(engine, models) as harness:
            client = harness.client
            sampling = Sampling(max_new_tokens=12, ignore_eos=True)
            old_sample, waiting_sample = (
                PolicyClient(client, sampling=sampling, rid=name, gate=harness.gate)
                for name in ("old", "waiting")
            )
            await old_sample.sample(np.array([99, 98], np.int32))
            running = asyncio.create_task(sample(client, PROMPT, 900))
            await until_running(client, 1)
            cached = []
            for version in (0, 1):
                first, again = [await sample(client, prompt, 12) for _ in range(2)]
                cached.append((first.num_cached_tokens, again.num_cached_tokens))
                for generation in (first, again):
                    assert generation.num_prompt_tokens == len(prompt)
                    assert set(generation.versions.tolist()) == {version}
                    assert error_of(references[version], prompt, generation) < TOLERANCE
                if version == 0:
                    await harness.push(weights_of(models[1]), mode="keep")
            assert cached == [(0, len(prompt) - 1), (0, len(prompt) - 1)]
            turn = await old_sample.sample(np.array(prompt, np.int32))
            assert turn.num_cached_tokens == len(prompt) - 1 and set(turn.versions.tolist()) == {1}
            assert error_of(references[1], prompt, turn) > TOLERANCE, "its KV is that of the old weights"
            late = await waiting_sample.sample(np.array(prompt, np.int32))
            assert error_of(references[1], prompt, late) < TOLERANCE, "it began after the push"
            generation = await asyncio.wait_for(running, HANG_LIMIT_S)
            assert set(generation.versions.tolist()) == {0, 1}, "the push did not wait for it"

    asyncio.run(body())


@pytest.mark.parametrize("how", ["unknown", "missing", "shape"])
def test_invalid_push_is_refused_before_the_engine_is_called(
    engine: Engine, models: Models, how: str
) -> None:
    tensors = weights_of(models[1])
    if how == "unknown":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[NAME]
    elif how == "missing":
        del tensors[NAME]
    else:
        tensors[NAME] = tensors[NAME].T.contiguous()

    async def body() -> None:
        async with harness_of(engine, models) as harness:
            with pytest.raises(WeightSyncError, match=how):
                await harness.push(tensors)
            assert not harness.quarantined and not harness.doubted
            await harness.check(load_model(models[0]), version=INITIAL)

    asyncio.run(body())


@pytest.mark.parametrize("mode", ["recompute", "keep", "abort_resume"])
def test_partial_update_is_quarantined_and_reloaded(engine: Engine, models: Models, mode: str) -> None:
    async def body() -> None:
        async with harness_of(engine, models) as harness:
            running = asyncio.create_task(sample(harness.client, PROMPT, 1500))
            await until_running(harness.client, 1)
            with pytest.raises(EngineError, match="receive"):
                await harness.push(weights_of(models[1]), num_sent=2, mode=mode)
            assert harness.quarantined == [INITIAL] and not harness.doubted
            interrupted = await asyncio.wait_for(running, HANG_LIMIT_S)
            assert set(interrupted.versions.tolist()) == {INITIAL}
            await harness.check(load_model(models[0]), version=INITIAL)
            await harness.push(weights_of(models[1]))
            await harness.check(load_model(models[1]), version=1)

    asyncio.run(body())


def test_push_broken_before_its_first_bucket_changes_nothing(engine: Engine, models: Models) -> None:
    async def body() -> None:
        async with harness_of(engine, models) as harness:
            await harness.push(weights_of(models[1]))
            with pytest.raises(EngineError, match="receive"):
                await harness.push(weights_of(models[0]), num_sent=0)
            assert not harness.quarantined and not harness.doubted
            await harness.check(load_model(models[1]), version=1)

    asyncio.run(body())


def test_engine_stuck_in_a_broadcast_can_be_used_again(
    engine: Engine, models: Models, config: Config, tmp_path: Path
) -> None:
    key = tmp_path / "engine.key"
    key.touch(mode=0o600)
    key.write_text(engine.api_key)
    rollout = replace(config.rollout, sglang=SglangConfig(url=engine.url, api_key_file=str(key)))

    async def body() -> None:
        async with harness_of(engine, models) as harness:
            with pytest.raises(TimeoutError):
                await harness.push(weights_of(models[1]), num_sent=1, hangs=True)
            assert harness.doubted and not harness.quarantined
        at_url = SglangAtUrl(
            replace(config, rollout=rollout),
            name="rollout-0",
            model=str(models[0]),
            context_tokens=CONTEXT,
            vocab_size=VOCAB,
        )
        async with await at_url.start(version=7) as client:
            generation = await asyncio.wait_for(sample(client, PROMPT, 12), HANG_LIMIT_S)
            assert (
                set(generation.versions.tolist()) == {7}
                and error_of(load_model(models[0]), PROMPT, generation) < TOLERANCE
            )
            dying = asyncio.create_task(at_url.died())
            await asyncio.sleep(0.1)
            assert not dying.done()
            at_url.kill()
            assert "abandoned" in await asyncio.wait_for(dying, HANG_LIMIT_S)

    asyncio.run(body())


def test_sglang_behavior_that_needs_our_guards(engine: Engine, models: Models) -> None:
    """The reasons for our guards. If one fails with a newer SGLang, a guard may no longer be needed."""
    tensors = weights_of(models[1])

    async def body() -> None:
        async with harness_of(engine, models) as harness, Pusher(engine, harness.client) as pusher:
            client = harness.client
            digest = await client.weights_checksum(timeout_s=30)
            # An unknown name is ignored, and the response is 200.
            await client.pause("retract")
            await client.begin_weight_update()
            await pusher.send({"model.layers.9.mlp.up_proj.weight": tensors[NAME]}, version=None)
            assert await client.weights_checksum(timeout_s=30) == digest
            # A wrong shape is refused only after the tensors before it were loaded.
            with pytest.raises(EngineError):
                await pusher.send(
                    {**tensors, NAME: tensors[NAME].T.contiguous()}, version=None, bucket_bytes=1 << 24
                )
            assert await client.weights_checksum(timeout_s=30) != digest
            await client.end_weight_update(timeout_s=10)
            await client.resume()
            # With sequences paused in place, a flush is refused, but the weights have changed already.
            running = asyncio.create_task(sample(client, PROMPT, 800))
            await until_running(client, 1)
            await client.pause("in_place")
            await client.begin_weight_update()
            digest = await client.weights_checksum(timeout_s=30)
            with pytest.raises(EngineError, match="not flushed"):
                await _send_flushing(pusher, weights_of(models[0]))
            assert await client.weights_checksum(timeout_s=30) != digest
            # While paused, /health would hang; our client reads /ready, which reports that it is not ready.
            assert not await asyncio.wait_for(client.health(), 4)
            await client.end_weight_update(timeout_s=10)
            await client.resume()
            await running
            # Seeds are accepted but have no effect.
            drawn = [await sample(client, PROMPT, 20, sampling_seed=11) for _ in range(3)]
            assert len({tuple(generation.output_ids.tolist()) for generation in drawn}) > 1

    asyncio.run(body())


async def _send_flushing(pusher: Pusher, tensors: Mapping[str, Tensor]) -> None:
    (bucket,) = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=1 << 24)
    assert pusher.group is not None
    receiving = asyncio.create_task(
        pusher.client.update_weights_from_distributed(
            bucket, group_name=pusher.name, timeout_s=20, flush_cache=True
        )
    )
    await asyncio.to_thread(pusher.group.broadcast, flatten(bucket, tensors))
    await receiving


def test_ids_outside_the_vocabulary_are_not_sent(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            for ids, stops in (([5, VOCAB], ()), ([-1], ()), ([5], (VOCAB,))):
                with pytest.raises(EngineError, match="outside the vocabulary"):
                    await sample(client, ids, 3, stop_token_ids=stops)
            assert len((await sample(client, PROMPT, 3)).output_ids) == 3

    asyncio.run(body())
