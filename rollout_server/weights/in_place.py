"""Weight pushes into SGLang, which overwrites its active weights and so must not decode during the update.

    SERVING -> requests held or not (update mode) -> paused -> update session: receive every bucket
            -> GPUs synchronized -> digest read -> cache flushed -> version set -> resumed: SERVING
    failed, digest unchanged -> resumed: SERVING with the old version
    failed, digest changed   -> QUARANTINED: reloaded from disk -> next push -> SERVING

Update modes:

    recompute      `retract` pause: the KV cache is dropped and rebuilt under the new weights
    keep           `in_place` pause: the old KV cache stays and is not flushed
    abort_resume   new requests are held, running sequences are interrupted and resubmitted afterwards
    drain          new requests are held until running sequences have finished

SGLang's own `abort` pause is not used, because it checks only once per second if running sequences have
ended.

Names and shapes are compared with the checkpoint before anything is sent, because SGLang responds with 200 to
an unknown name. The version is set by a separate call at the end, so that tokens get it only if everything
before has succeeded. Unlike the embedded engine, SGLang does not verify the received bytes: TCP and NCCL
protect them in transit, and the digest over all parameters shows if anything was loaded. It does not prove
what was loaded: SGLang computes it after loading, from 64-bit hashes of its own fused and sharded tensors. So
a push with `weights.integrity=sha256` is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass

from areal_like.errors import EngineError, WeightSyncError
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import SglangClient
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from rollout_server.weights.strategy import (
    EngineReceives,
    OnQuarantine,
    OnUntrusted,
    WeightPush,
    until_empty,
)

log = logging.getLogger(__name__)

_DIGEST_TIMEOUT_S = 30.0
"""Time for the engine to report its digest, in addition to the time to compute it."""
_RECOVERY_TIMEOUT_S = 5.0
"""The same after a failure, where the engine does not respond while stuck in a broadcast."""
_DIGEST_ELEMENTS_PER_S = 5e9
"""Minimum rate at which an engine computes its digest, over all its ranks."""


@dataclass(eq=False, kw_only=True)
class SglangWeightUpdate(EngineReceives):
    """A `WeightUpdateStrategy` that pauses the engine, loads in place, and undoes a partial load."""

    shapes: CheckpointShapes
    gate: GenerationGate
    on_quarantine: OnQuarantine
    """Called before a partial update is undone."""
    on_untrusted: OnUntrusted
    """Called if undoing it failed."""
    reload_timeout_s: float = 120.0
    """Time limit of the load from disk that undoes it."""

    def __post_init__(self) -> None:
        num_elements = sum(math.prod(shape) for shape in self.shapes.shapes.values())
        digest_s = num_elements / _DIGEST_ELEMENTS_PER_S
        self._digest_timeout_s = _DIGEST_TIMEOUT_S + digest_s
        self._recovery_s = _RECOVERY_TIMEOUT_S + digest_s
        self._path, self._path_version = "", 0
        self._initial_digest = self._digest = ""

    async def engine_started(self, client: EngineClient, *, path: str, version: int) -> None:
        """Records `path`, for a reload after a failed push, and the digest of the weights loaded from it."""
        assert isinstance(client, SglangClient)
        self._path, self._path_version = path, version
        self._initial_digest = self._digest = await client.weights_checksum(timeout_s=self._digest_timeout_s)

    async def restore_after_failed_load(
        self, client: EngineClient, *, path: str, version: int, timeout_s: float
    ) -> None:
        """Loads the weights at `path`, because the failed load may have changed some of them."""
        await client.update_weights_from_disk(path, weight_version=version, timeout_s=timeout_s)

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        """Pauses the engine, loads a version into it and resumes it."""
        assert isinstance(client, SglangClient)
        request = push.request
        if request.integrity != "none":
            raise WeightSyncError(
                f"SGLang cannot verify weights before it loads them: weights.integrity={request.integrity} "
                "needs rollout.engine=embedded"
            )
        self.shapes.check(push.manifest.tensors, untrained=push.manifest.untrained)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        is_held = request.update_mode in ("abort_resume", "drain")
        is_done = False
        try:
            with push.cancellable():
                if is_held:
                    self.gate.hold()
                    is_interrupting = request.update_mode == "abort_resume"
                    await until_empty(self.gate, client, interrupting=is_interrupting)
                await client.pause("in_place" if request.update_mode == "keep" else "retract")
                # Only now, because everything computed before the pause must have the salt of the old
                # weights.
                client.renew_cache_salt()
                if request.update_mode == "keep":
                    # An `in_place` pause returns while the GPU still computes the last batch, and weights are
                    # loaded on another stream: they would change under that batch.
                    await client.synchronize(timeout_s=push.left_s())
                await client.begin_weight_update()
                push.ready()
                for index, bucket in enumerate(push.manifest.buckets):
                    group_name = client.group_of_bucket(request.group_name, index)
                    await client.update_weights_from_distributed(
                        bucket, group_name=group_name, timeout_s=push.left_s()
                    )
                # Here and not in the digest below, because over NCCL this waits for the other ranks.
                await client.synchronize(timeout_s=push.left_s())
            await client.end_weight_update(timeout_s=push.left_s())
            digest = await client.weights_checksum(timeout_s=push.left_s())
            if request.update_mode != "keep":
                # Not with `keep`: sequences still run, so SGLang would refuse the flush, and the push would
                # fail after it has changed the weights.
                await client.flush_cache()
            await client.set_weight_version(request.version)
            self._digest = digest
            is_done = True
        finally:
            # Shielded: a cancelled push must not leave the engine paused forever.
            await asyncio.shield(
                asyncio.ensure_future(self._finish(client, is_done=is_done, is_held=is_held))
            )
        return loop.time() - started_s

    async def _finish(self, client: SglangClient, *, is_done: bool, is_held: bool) -> None:
        """Resumes the engine; after a failed push, first reloads it if part of the update was loaded."""
        try:
            async with asyncio.timeout(self._recovery_s):
                is_unchanged = is_done or self._digest == await client.weights_checksum(
                    timeout_s=self._recovery_s
                )
            if not is_unchanged:
                await self._reload(client)
            if not is_done:
                await self._end_session(client)
            await client.resume()
        except (EngineError, TimeoutError) as error:
            # A closed client means that its engine is already lost; the new engine must not be reported
            # instead.
            if not client.is_closed:
                self.on_untrusted(f"its weights are unknown after a failed push: {error or 'no response'}")
        finally:
            if is_held:
                self.gate.release()

    async def _reload(self, client: SglangClient) -> None:
        """Undoes a partial update: loads the weights on disk again, under the version of that checkpoint."""
        self.on_quarantine("part of an update was loaded", self._path_version)
        # `retract`: after an `in_place` pause the running sequences would prevent a flush of the cache.
        await client.pause("retract")
        client.renew_cache_salt()
        await client.abort()
        await self._end_session(client)
        await client.update_weights_from_disk(
            self._path, weight_version=self._path_version, timeout_s=self.reload_timeout_s
        )
        digest = await client.weights_checksum(timeout_s=self._digest_timeout_s)
        if digest != self._initial_digest:
            raise EngineError(
                f"after a reload from {self._path} the digest of the weights is {digest}, "
                f"at the engine's start it was {self._initial_digest}"
            )
        self._digest = digest
        log.warning("reloaded from %s", self._path)

    async def _end_session(self, client: EngineClient) -> None:
        try:
            await client.end_weight_update(timeout_s=_RECOVERY_TIMEOUT_S)
        except EngineError as error:
            log.debug("no update session was open: %s", error)
