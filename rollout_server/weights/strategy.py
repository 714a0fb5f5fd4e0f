"""The interface between weight pushes and engines: each kind of engine has its own update strategy.

    strategy = make_update_strategy(config, model=model, gate=gate, on_quarantine=..., on_untrusted=...)
    client = await engine.start(version=0)
    await strategy.engine_started(client, path=model, version=0)     # after every start
    ...
    stall_s = await strategy.push(client, push)                      # once for each push

Three implementations: the embedded engine receives into shadow weights while it decodes (shadow.py); SGLang
is paused and loads in place (in_place.py), or loads LoRA adapters that this server receives for it
(adapter_folder.py). The receiver of pushes (receiver.py) calls only this interface and does not depend on the
kind of engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from areal_like.weights.buckets import Manifest
from areal_like.weights.integrity import BucketSums
from areal_like.wire.messages.weights import FormGroup, PushWeights
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate

_ABORT_AGAIN_S = 0.1


@dataclass(frozen=True, kw_only=True)
class WeightPush:
    """One push as the receiver passes it to a strategy."""

    request: PushWeights
    manifest: Manifest
    """`request.manifest`, parsed."""
    left_s: Callable[[], float]
    """Seconds left until the push times out; always positive."""
    cancellable: Callable[[], AbstractContextManager[None]]
    """Context for waits on other ranks; a newer control message may cancel the push only inside it."""
    ready: Callable[[], None]
    """Tells rank 0 that the engine takes part in the broadcast from now on. Call it when the engine has
    paused, if it does, and right before it is asked to receive."""
    sent_sums: Callable[[], Awaitable[BucketSums]]
    """Waits for the sender's sums, one per bucket, in the order of the manifest."""


class WeightUpdateStrategy(Protocol):
    """Updates an engine from version to version; no token may come from a partial update."""

    async def engine_started(self, client: EngineClient, *, path: str, version: int) -> None:
        """Call after each start: the engine holds the weights at `path` as `version`. Raises EngineError."""

    async def restore_after_failed_load(
        self, client: EngineClient, *, path: str, version: int, timeout_s: float
    ) -> None:
        """Call after a failed load from disk: restores the weights at `path`. Raises EngineError.

        Does nothing for an engine that verifies a load before it activates it.
        """

    async def join_group(self, client: EngineClient, request: FormGroup) -> None:
        """Joins a weight group, at the same time as rank 0. Raises EngineError or WeightSyncError."""

    async def leave_group(self, client: EngineClient, group_name: str) -> None:
        """Leaves the group. Raises EngineError or WeightSyncError if it is in no such group."""

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        """Receives, verifies and activates a version; returns for how many seconds the engine did not decode.

        Raises WeightSyncError, EngineError or TimeoutError. The old version is then still active, or
        `on_quarantine` or `on_untrusted` was called.
        """


class EngineReceives:
    """The part of a strategy whose engine is itself a member of the weight group."""

    async def join_group(self, client: EngineClient, request: FormGroup) -> None:
        """See WeightUpdateStrategy."""
        await client.init_weights_group(request)

    async def leave_group(self, client: EngineClient, group_name: str) -> None:
        """See WeightUpdateStrategy."""
        await client.destroy_weights_group(group_name=group_name)


async def until_empty(gate: GenerationGate, client: EngineClient, *, interrupting: bool) -> None:
    """Waits until the engine has no requests of this server; aborts them if `interrupting`. Hold the gate
    first."""
    if interrupting:
        while gate.num_inside:
            await client.abort()
            # A request that was still on its way to the engine is aborted in the next round.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_AGAIN_S):
                    await gate.wait_empty()
    await gate.wait_empty()


OnQuarantine = Callable[[str, int], None]
"""Called with the reason and the version that a reload will restore. No token may be delivered until the next
push has succeeded."""
OnUntrusted = Callable[[str], None]
"""Called with the reason when the weights that the engine holds are unknown: it has to be replaced."""
