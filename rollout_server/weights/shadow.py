"""Weight pushes into the embedded engine: received into shadow weights while it decodes, then swapped in.

recompute, keep   receive while decoding continues; verify; swap between two decode steps
abort_resume      as above, but running sequences are interrupted before the swap and resubmitted after it
drain             as above, but new requests are held and running sequences finish before the swap

A LoRA adapter (`weights.lora=adapter`) is received in the same way. With `drain` nothing has to wait for it:
running sequences finish under the adapter that they have, and new ones get the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from areal_like.errors import EngineError, WeightSyncError
from areal_like.weights.integrity import difference
from rollout_server.policy.client import EmbeddedClient, EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.strategy import EngineReceives, OnUntrusted, WeightPush

_FINISH = "finish"
"""What `drain` is for an adapter."""
_WHILE_DECODING = ("recompute", "keep", _FINISH)
"""Update modes in which sequences keep running through the swap."""


@dataclass(eq=False, kw_only=True)
class ShadowWeightUpdate(EngineReceives):
    """A `WeightUpdateStrategy` that activates only verified weights, so the old ones survive a failure."""

    gate: GenerationGate
    on_untrusted: OnUntrusted

    async def engine_started(self, client: EngineClient, *, path: str, version: int) -> None:
        """Does nothing: there is nothing to prepare."""

    async def restore_after_failed_load(
        self, client: EngineClient, *, path: str, version: int, timeout_s: float
    ) -> None:
        """Does nothing: the old weights are still active."""

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        """Receives a version, compares its sums with the sender's, and activates it."""
        assert isinstance(client, EmbeddedClient)
        buckets, integrity = push.manifest.buckets, push.request.integrity
        with push.cancellable():
            push.ready()
            received = await client.receive_weights(
                buckets,
                group_name=push.request.group_name,
                timeout_s=push.left_s(),
                integrity=integrity,
                adapter=push.manifest.adapter,
                base_digest=push.request.base_digest,
            )
            sent = await push.sent_sums()
        wrong = difference(received=received, sent=sent, num_buckets=len(buckets), integrity=integrity)
        if wrong:
            raise WeightSyncError(f"version {push.request.version}: {wrong}")
        return await self._activate(client, push)

    async def _activate(self, client: EmbeddedClient, push: WeightPush) -> float:
        """Activates the received weights as the update mode requires; returns the seconds without
        decoding."""
        mode, loop = push.request.update_mode, asyncio.get_running_loop()
        running = "keep" if mode == "keep" else "recompute"
        if push.manifest.adapter is not None and mode == "drain":
            mode = running = _FINISH
        started_s = loop.time()
        async with self._without_sequences(client, mode):
            response = await client.end_weight_update(
                weight_version=push.request.version, running=running, timeout_s=push.left_s()
            )
        if mode in _WHILE_DECODING:
            return float(response.get("stall_s", 0.0))
        return loop.time() - started_s

    @contextlib.asynccontextmanager
    async def _without_sequences(self, client: EmbeddedClient, mode: str) -> AsyncIterator[None]:
        """In some modes, interrupts running sequences or waits for them, and holds new ones."""
        if mode in _WHILE_DECODING:
            yield
            return
        if mode not in ("abort_resume", "drain"):
            raise WeightSyncError(f"unknown update mode {mode!r}")
        try:
            if mode == "drain":
                self.gate.hold()
                await self.gate.wait_empty()
            else:
                await client.pause("abort")
            yield
        finally:
            # Shielded: a cancelled push must not leave the engine paused forever.
            await asyncio.shield(asyncio.ensure_future(self._resume(client, mode)))

    async def _resume(self, client: EmbeddedClient, mode: str) -> None:
        if mode == "drain":
            self.gate.release()
            return
        try:
            await client.resume()
        except EngineError as error:
            # A closed client means that its engine is already lost; the new engine must not be reported
            # instead.
            if not client.is_closed:
                self.on_untrusted(f"it stays paused after a push: {error}")
            raise
