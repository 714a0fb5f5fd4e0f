"""Weight pushes into the embedded engine: received into shadow weights while it decodes, then swapped in.

recompute, keep   receive while decoding continues; verify; swap between two decode steps
abort_resume      as above, but running sequences are interrupted before the swap and resubmitted after it
drain             as above, but new requests are held and running sequences finish before the swap
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from areal_like.errors import EngineError, WeightSyncError
from areal_like.weights.integrity import difference
from rollout_server.policy.client import EmbeddedClient, EngineClient
from rollout_server.policy.gate import GenerationGate
from rollout_server.weights.strategy import OnUntrusted, WeightPush


class ShadowWeightUpdate:
    """A `WeightUpdateStrategy` that activates only verified weights, so a failure leaves the old ones."""

    def __init__(self, *, gate: GenerationGate, on_untrusted: OnUntrusted) -> None:
        self._gate = gate
        self._on_untrusted = on_untrusted

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
            received = await client.receive_weights(
                buckets,
                group_name=push.request.group_name,
                timeout_s=push.left_s(),
                integrity=integrity,
            )
            sent = await push.sent_sums()
        wrong = difference(received=received, sent=sent, num_buckets=len(buckets), integrity=integrity)
        if wrong:
            raise WeightSyncError(f"version {push.request.version}: {wrong}")
        return await self._activate(client, push)

    async def _activate(self, client: EngineClient, push: WeightPush) -> float:
        """Activates the received weights by the update mode; returns the seconds without decoding."""
        mode = push.request.update_mode

        async def swap() -> float:
            response = await client.end_weight_update(
                weight_version=push.request.version,
                running="keep" if mode == "keep" else "recompute",
                timeout_s=push.left_s(),
            )
            return float(response.get("stall_s", 0.0))

        async def hold_and_drain() -> None:
            self._gate.hold()
            await self._gate.wait_empty()

        async def release() -> None:
            self._gate.release()

        match mode:
            case "recompute" | "keep":
                return await swap()
            case "abort_resume":
                return await _between(lambda: client.pause("abort"), swap, lambda: self._resume(client))
            case "drain":
                return await _between(hold_and_drain, swap, release)
        raise WeightSyncError(f"unknown update mode {mode!r}")

    async def _resume(self, client: EngineClient) -> None:
        try:
            await client.resume()
        except EngineError as error:
            # A closed client means that its engine is lost already: a new one must not be reported instead.
            if not client.is_closed:
                self._on_untrusted(f"it stays paused after a push: {error}")
            raise


async def _between(
    before: Callable[[], Awaitable[None]],
    swap: Callable[[], Awaitable[float]],
    after: Callable[[], Coroutine[Any, Any, None]],
) -> float:
    """Runs `before`, `swap` and `after`; `after` also if `before` or `swap` failed or was cancelled.

    Returns the seconds for all three.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        await before()
        await swap()
    finally:
        # Shielded: a cancelled push must not leave the engine paused forever.
        await asyncio.shield(asyncio.ensure_future(after()))
    return loop.time() - started_s
