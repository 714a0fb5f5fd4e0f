"""A push into an engine that loads weights in place (SGLang): nothing may be decoded from the first byte to the verdict.

    SERVING -> quiet (see below) -> paused -> session: every bucket -> digest -> cache flushed -> version named -> resumed: SERVING
                                       \\-> failed, digest as before -> resumed: SERVING, old version
                                       \\-> failed, digest changed -> QUARANTINED: reloaded from disk, digest as at the start -> next push

    recompute      `retract` pause: KV is given up, and rebuilt under the new weights
    keep           `in_place` pause: old KV stays; no flush, which SGLang refuses while sequences run, after it has changed the weights
    abort_resume   newcomers held, running sequences interrupted, and resubmitted afterwards with what they had
    drain          newcomers held until running sequences have finished

Names and shapes are compared with the checkpoint before the engine hears of the push: SGLang answers 200 to a name that it does not know.
The version is named in a call of its own, last, so that a token can only carry it when everything before went well. Bytes are not
verified by the engine, as the embedded one does: TCP and NCCL carry them, and that something else was loaded than before is seen by the
digest. `pause abort` of SGLang is not used: it looks once a second whether the running sequences have gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from areal_like.errors import EngineError
from areal_like.weights.buckets import Manifest
from areal_like.wire.messages.weights import PushWeights
from rollout_server.episodes.base import GenerationGate
from rollout_server.inference.sglang.checkpoint_shapes import ModelTensors
from rollout_server.inference.sglang.client import SglangClient

log = logging.getLogger(__name__)

_SETTLE_S = 5.0
"""For an engine to say what it holds after a failure; one that is stuck in a broadcast says nothing."""
_RELOAD_S = 120.0
_ABORT_AGAIN_S = 0.1


class SglangWeightUpdate:
    """Pushes to one SGLang at a time; `begin_with` tells it of a new one."""

    def __init__(
        self,
        *,
        tensors: ModelTensors,
        turnstile: GenerationGate,
        on_quarantine: Callable[[str, int], None],
        on_doubt: Callable[[str], None],
    ) -> None:
        """`on_quarantine` is called before an engine with a partial update is reloaded, with the version that it will have then;
        `on_doubt` when that failed too."""
        self._tensors = tensors
        self._turnstile = turnstile
        self._on_quarantine = on_quarantine
        self._on_doubt = on_doubt
        self._path, self._path_version = "", 0
        self._initial_digest = self._digest = ""

    async def begin_with(self, engine: SglangClient, *, path: str, version: int) -> None:
        """A started engine, which holds the weights at `path`, called `version`. Raises EngineError."""
        self._path, self._path_version = path, version
        self._initial_digest = self._digest = await engine.weights_checksum()

    async def push(
        self,
        engine: SglangClient,
        request: PushWeights,
        manifest: Manifest,
        *,
        left_s: Callable[[], float],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> float:
        """Loads and activates; returns the seconds without decoding. `waiting` surrounds what may be cancelled.

        Raises WeightSyncError or EngineError with the old version serving, or the engine quarantined or declared lost.
        """
        self._tensors.check(manifest.tensors)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        is_held = request.update_mode in ("abort_resume", "drain")
        is_done = False
        try:
            with waiting():
                if is_held:
                    self._turnstile.hold()
                    await self._empty(engine, interrupting=request.update_mode == "abort_resume")
                await engine.pause("in_place" if request.update_mode == "keep" else "retract")
                await engine.begin_weight_update()
                for bucket in manifest.buckets:
                    await engine.update_weights_from_distributed(
                        bucket, group_name=request.group_name, timeout_s=left_s()
                    )
            await engine.end_weight_update(timeout_s=left_s())
            digest = await engine.weights_checksum()
            if request.update_mode != "keep":
                await engine.flush_cache()
            await engine.set_weight_version(request.version)
            self._digest = digest
            is_done = True
        finally:
            # Shielded: a push that is cancelled must not leave an engine paused for ever.
            await asyncio.shield(
                asyncio.ensure_future(self._finish(engine, is_done=is_done, is_held=is_held))
            )
        return loop.time() - started_s

    async def _empty(self, engine: SglangClient, *, interrupting: bool) -> None:
        """Until no sequence of ours is at the engine."""
        if interrupting:
            while self._turnstile.num_inside:
                await engine.abort()
                with contextlib.suppress(
                    TimeoutError
                ):  # a request that was on its way is there the next time
                    async with asyncio.timeout(_ABORT_AGAIN_S):
                        await self._turnstile.wait_empty()
        await self._turnstile.wait_empty()

    async def _finish(self, engine: SglangClient, *, is_done: bool, is_held: bool) -> None:
        try:
            async with asyncio.timeout(_SETTLE_S):
                is_whole = is_done or await engine.weights_checksum() == self._digest
            if not is_whole:
                await self._reload(engine)
            if not is_done:
                await self._end_session(engine)
            await engine.resume()
        except (EngineError, TimeoutError) as error:
            if not engine.is_closed:  # else its owner has lost it already, and may have started another
                self._on_doubt(f"cannot be trusted after a failed push: {error or 'no answer'}")
        finally:
            if is_held:
                self._turnstile.release()

    async def _reload(self, engine: SglangClient) -> None:
        """Part of an update is loaded: back to what the disk holds, under its own version."""
        self._on_quarantine("part of an update was loaded", self._path_version)
        await engine.pause("retract")  # after `in_place`: what runs would keep the cache from being flushed
        await engine.abort()
        await self._end_session(engine)
        await engine.update_weights_from_disk(
            self._path, weight_version=self._path_version, timeout_s=_RELOAD_S
        )
        if (digest := await engine.weights_checksum()) != self._initial_digest:
            raise EngineError(
                f"after a reload from {self._path} its weights' digest is {digest}, at its start {self._initial_digest}"
            )
        self._digest = digest
        log.warning("reloaded from %s", self._path)

    async def _end_session(self, engine: SglangClient) -> None:
        try:
            await engine.end_weight_update(timeout_s=_SETTLE_S)
        except EngineError as error:
            log.debug("no session was open: %s", error)
