"""Rank 0: keeps the engines at the newest weights while training goes on.

    idle -> offer(snapshot) -> acquired -> version granted by the buffer -> broadcast -> active at the servers -> released -> idle
                 ^ a newer snapshot offered meanwhile replaces one that has not been acquired

The trainer freezes its weights and goes on at once. Skipped snapshots never get a version. Runs in the link's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ArealError
from areal_like.wire.messages.consumer import AllocVersion, ServerEntry, VersionGranted
from trainer.weight_sync.broadcaster import Broadcaster
from trainer.weight_sync.snapshot import Snapshot

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What one push came to."""

    version: int
    step: int
    num_activated: int
    failed: dict[str, str]
    num_bytes: int
    seconds: float
    stall_seconds: float
    """Longest time that one engine decoded nothing because of the push."""
    recovery_seconds: float
    """Longest time that a survivor of a broken broadcast needed to get out of it; 0 when none broke."""


class Publisher:
    """Owns one task; create it inside the event loop, end it with `close`."""

    def __init__(
        self,
        broadcaster: Broadcaster,
        *,
        call: Callable[..., Awaitable[Any]],
        servers: Callable[[], list[ServerEntry]],
        on_push: Callable[[PushReport], None],
        on_failure: Callable[[ArealError], None],
    ) -> None:
        """`on_failure` is told why no more weights will be published: nobody awaits this task while training goes on."""
        self._broadcaster = broadcaster
        self._call = call
        self._servers = servers
        self._on_push = on_push
        self._on_failure = on_failure
        self._offered: tuple[int, Snapshot] | None = None
        self._wake = asyncio.Event()
        self._is_pushing = False
        self._active = asyncio.Condition()
        self.active_step = -1
        """Step of the newest weights that every answering server has active; -1 before the first push."""
        self.active_version = 0
        self._newest_version = 0
        """Newest that was granted to us; a server that names a newer one kept it from an earlier run."""
        self._holds: dict[tuple[str, int], int] = {}
        self._task = asyncio.create_task(self._run(), name="publisher")

    def offer(self, step: int, snapshot: Snapshot, *, loaded: bool = False) -> None:
        """The newest weights: those at the start of optimizer step `step`.

        `loaded`: servers start with these, so they are sent only to one that falls behind.
        """
        self._offered = (step, snapshot)
        if loaded:
            self.active_step = step
        else:
            self._wake.set()

    async def wait_active(self, step: int) -> int:
        """Waits until weights of `step` or later are active somewhere; returns their version. The caller bounds the wait."""
        async with self._active:
            await self._active.wait_for(lambda: self.active_step >= step or self._task.done())
        if self._task.done():
            self._task.result()
        return self.active_version

    async def close(self) -> None:
        """Ends the task and the group."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._broadcaster.close()

    async def _run(self) -> None:
        try:
            retry_s: float | None = None
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await self._wake.wait()
                self._wake.clear()
                if self._offered is not None:
                    self._is_pushing = True
                    await self._publish(*self._offered)
                    self._is_pushing = False
                    # A server that joins or recovers must not wait for the trainer's next step: with max_staleness 0 that step waits
                    # for the server.
                    retry_s = _RETRY_S if self._behind(self._servers()) else None
        except ArealError as error:
            self._on_failure(error)
            raise
        except Exception as error:  # the outermost frame of a task that nobody awaits while training goes on
            log.exception("the publisher ended")
            self._on_failure(ArealError(f"no more weights are published: {type(error).__name__}: {error}"))
            raise
        finally:
            async with self._active:
                self._active.notify_all()

    async def _publish(self, step: int, snapshot: Snapshot) -> None:
        # Without anybody who would gain by it, a version would be spent, and everybody made to recompute, again and again: one that is
        # left out is behind all the while. A snapshot that is superseded already will be followed by the offer of its successor.
        if self._behind(self._broadcaster.eligible(self._servers())) and snapshot.acquire():
            try:
                await self._push(step, snapshot)
            finally:
                snapshot.release()

    async def _push(self, step: int, snapshot: Snapshot) -> None:
        granted: VersionGranted = await self._call(AllocVersion(step=step), timeout_s=_CALL_TIMEOUT_S)
        self._newest_version = granted.version
        started_s = time.monotonic()
        servers = {(server.name, server.incarnation): server for server in self._servers()}
        outcome = await self._broadcaster.push(
            snapshot, version=granted.version, step=step, servers=list(servers.values())
        )
        report = PushReport(
            version=granted.version,
            step=step,
            num_activated=len(outcome.activated),
            failed=outcome.failed,
            num_bytes=sum(bucket.num_bytes for bucket in snapshot.buckets),
            seconds=time.monotonic() - started_s,
            stall_seconds=max((answer.stall_seconds for answer in outcome.activated.values()), default=0.0),
            recovery_seconds=max(outcome.recovery_s.values(), default=0.0),
        )
        for name, reason in outcome.failed.items():
            log.warning("push of version %d to %s failed: %s", granted.version, name, reason)
        if outcome.activated:
            self._holds = {key: version for key, version in self._holds.items() if key in servers} | {
                key: granted.version for key in servers if key[0] in outcome.activated
            }
            async with self._active:
                self.active_step, self.active_version = step, granted.version
                self._active.notify_all()
        self._on_push(report)

    def directory_changed(self) -> None:
        """A server joined or changed: offers it the newest weights if it is behind."""
        # What a push in progress leaves undone is seen at its end.
        if not self._is_pushing and self._offered is not None and self._behind(self._servers()):
            self._wake.set()

    def _behind(self, servers: list[ServerEntry]) -> bool:
        """Whether any of these lacks the newest weights."""

        def version_of(server: ServerEntry) -> int:
            if server.state == "quarantined" or server.weights_version > self._newest_version:
                return -1
            # The directory lags behind what a server told us itself.
            return max(server.weights_version, self._holds.get((server.name, server.incarnation), -1))

        # A push that reached nobody (a resumed trainer is often ready before its servers) leaves `active_version` where it was.
        is_owed = self._offered is not None and self.active_step < self._offered[0]
        reachable = [server for server in servers if server.state in ("serving", "quarantined")]
        return any(is_owed or version_of(server) < self.active_version for server in reachable)
