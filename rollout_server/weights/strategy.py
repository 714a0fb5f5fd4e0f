"""The interface between weight pushes and engines: each kind of engine has its own update strategy.

    strategy = make_update_strategy(config, model=model, gate=gate, on_quarantine=..., on_untrusted=...)
    client = await engine.start(version=0)
    await strategy.engine_started(client, path=model, version=0)     # after every start
    ...
    stall_s = await strategy.push(client, push)                      # once for each push

Two implementations: the embedded engine receives into shadow weights while it decodes (shadow.py);
SGLang is paused and loads in place (in_place.py). The receiver of pushes
(receiver.py) calls only this interface and does not depend on the kind of engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from areal_like.weights.buckets import Manifest
from areal_like.weights.integrity import BucketSums
from areal_like.wire.messages.weights import PushWeights
from rollout_server.policy.client import EngineClient


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

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        """Receives, verifies and activates a version; returns for how many seconds the engine did not decode.

        Raises WeightSyncError, EngineError or TimeoutError. The old version is then still active, or
        `on_quarantine` or `on_untrusted` was called.
        """


OnQuarantine = Callable[[str, int], None]
"""Called with the reason and the version that a reload will restore. No token may be delivered until the next
push has succeeded."""
OnUntrusted = Callable[[str], None]
"""Called with the reason when the weights that the engine holds are unknown: it has to be replaced."""
