"""Keeps the engines at the newest weights while training continues (trainer rank 0).

A snapshot that is replaced by a newer one before its push starts is skipped and never gets a version. If the
trainer itself cannot send, because another sender is lost or its buckets are not ready in time, the next push
waits for .5 s, then twice as long after each further failure, at most `_MAX_RETRY_S`, under a name in the
stall report. A version that no server was asked to activate is used by the next push of the same snapshot.

The publisher runs in the event loop of the trainer's buffer client.
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
from areal_like.runtime.waits import PendingWaits
from areal_like.wire.messages.consumer import AllocVersion, ServerEntry, VersionGranted
from areal_like.wire.messages.producer import ServerState
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.checks import NOISE, CheckReport, WeightChecks
from trainer.weights.receivers import ReceiverId, receiver_id
from trainer.weights.snapshot import Snapshot

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_MAX_RETRY_S = 30.0
_CALL_TIMEOUT_S = 30.0
OWN_FAILURE = "weights: the trainer's own senders to be able to send"
"""Name of the wait after a push that failed in the trainer itself (`buffer/diagnosis/rules.py` knows it)."""


def retry_delay_s(num_failures: int) -> float:
    """Seconds to the next try, after this many pushes in a row that failed in the trainer itself."""
    return min(_MAX_RETRY_S, _RETRY_S * 2.0 ** min(num_failures - 1, 9))


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """Figures of one push."""

    version: int
    step: int
    num_activated: int
    failed: dict[str, str]
    """Server name (or `broadcast`) -> reason."""
    num_bytes: int
    """Bytes of the weights."""
    whole_bytes: int
    """Bytes broadcast of buckets that were sent whole, over all groups."""
    delta_bytes: int
    """Bytes broadcast in place of the other buckets (`weights.delta`), over all groups."""
    changed_fraction: float | None
    """Of the numbers that were compared with the push before, those that differ; None: none were."""
    seconds: float
    """Seconds from the granted version to the last server's reply."""
    staging_seconds: float
    """The part before engines were asked to receive: gathering every bucket and computing its sums; 0 if all
    engines decode while they receive."""
    broadcast_seconds: float
    """The part from the request to the engines to the end of the last broadcast, for the slowest group."""
    stall_seconds: float
    """Longest time that one engine decoded nothing because of the push."""
    num_senders: int
    """Trainer ranks that sent, or tried to."""
    recovery_seconds: float
    """Longest time that a survivor needed to leave a broken broadcast; 0 if none broke."""


class Publisher:
    """Owns the task that pushes weights.

    Create it inside the event loop, end it with `close`. One push, end to end:

        snapshot = snapshotter.take_snapshot()      # on every rank, between two steps; training continues
        publisher.offer(step, snapshot)             # rank 0; the publisher's task does the rest:
        snapshot.acquire()                          # False if a newer snapshot has replaced it
        version = (await call(AllocVersion(step=step))).version     # granted by the buffer, never reused
        await broadcaster.push(snapshot, version=version, ...); snapshot.release()

    A newer snapshot may replace an offered one until it is acquired:

        IDLE -> offer() -> OFFERED -> acquire() -> version granted -> broadcast -> active -> release() -> IDLE
    """

    def __init__(
        self,
        broadcaster: Broadcaster,
        *,
        call: Callable[..., Awaitable[Any]],
        servers: Callable[[], list[ServerEntry]],
        on_push: Callable[[PushReport], None],
        on_failure: Callable[[ArealError], None],
        on_check: Callable[[CheckReport], None] = lambda report: None,
        check_interval_s: float | None = None,
        check_noise: float = NOISE["float32"],
        check_hint: str = "",
        waits: PendingWaits | None = None,
    ) -> None:
        """`call`: sends a request to the buffer. `servers`: the buffer's directory of rollout servers.

        `on_failure`: called with the error when the task fails, because nothing awaits the task until the
        end of training. `on_check`: called with each comparison of log-probs (`checks.py`).
        `check_interval_s`: shortest time between two checks of a server; None: no checks. `check_noise`: see
        JumpDetector; `check_hint`: see WeightChecks. `waits`: lists the time in which the trainer cannot
        send.
        """
        self._waits = waits or PendingWaits()
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
        """Step of the newest weights that at least one server has active; -1 before the first push."""
        self.active_version = 0
        self._newest_version = 0
        """Newest version granted to this trainer; a newer version at a server comes from an earlier run."""
        self._unused: tuple[Snapshot, int] | None = None
        """A version that no server was asked to activate, and the snapshot for which it was granted."""
        self._num_own_failures = 0
        """Pushes in a row that failed in the trainer itself."""
        self._activated_versions: dict[ReceiverId, int] = {}
        """Server -> version that it confirmed to this publisher, which may be newer than in the directory."""
        self._distrusted: set[ReceiverId] = set()
        """Servers whose log-probs do not match the weights that they report."""
        self.checks: WeightChecks | None = None
        if check_interval_s is not None:
            self.checks = WeightChecks(
                broadcaster.score_at,
                interval_s=check_interval_s,
                on_report=on_check,
                on_repush=self._push_again,
                noise=check_noise,
                hint=check_hint,
            )
        self._task = asyncio.create_task(self._run(), name="publisher")

    def offer(self, step: int, snapshot: Snapshot, *, loaded: bool = False) -> None:
        """Offers the weights at the start of step `step`; replaces an offer whose push has not begun.

        `loaded`: servers start with these weights, so they are sent only to a server that falls behind.
        """
        self._offered = (step, snapshot)
        if loaded:
            self.active_step = step
        else:
            self._wake.set()

    async def wait_until_active(self, step: int) -> int:
        """Waits until a server has weights of `step` or later active; returns their version. No timeout."""
        async with self._active:
            await self._active.wait_for(lambda: self.active_step >= step or self._task.done())
        if self._task.done():
            self._task.result()
        return self.active_version

    async def close(self) -> None:
        """Ends the task and dissolves the weight groups of the remaining servers."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.checks is not None:
            await self.checks.close()
        left = [server for server in self._servers() if server.state != ServerState.DRAINING]
        await self._broadcaster.close({receiver_id(server) for server in left})

    def directory_changed(self) -> None:
        """To be called when a server joined or changed: a server that is behind gets the newest weights."""
        # During a push this does nothing: `_run` reads the directory again when the push ends.
        if not self._is_pushing and self._offered is not None and self._any_behind(self._servers()):
            self._wake.set()

    async def _run(self) -> None:
        own_failure = contextlib.ExitStack()
        try:
            retry_s: float | None = None
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(retry_s):
                        await self._wake.wait()
                self._wake.clear()
                num_before = self._num_own_failures
                if self._offered is not None:
                    self._is_pushing = True
                    await self._push_if_needed(*self._offered)
                    self._is_pushing = False
                    # A server that joins or recovers must not wait for the trainer's next step: with
                    # max_staleness=0 that step waits for the server.
                    retry_s = _RETRY_S if self._any_behind(self._servers()) else None
                if self._num_own_failures == 0:
                    own_failure.close()
                elif self._num_own_failures > num_before:
                    if num_before == 0:
                        own_failure.enter_context(self._waits(OWN_FAILURE))
                    # No change of servers or weights helps, so none ends this wait early.
                    await asyncio.sleep(retry_delay_s(self._num_own_failures))
                    retry_s = 0.0
        except ArealError as error:
            self._on_failure(error)
            raise
        except Exception as error:  # outermost frame of a task that is not awaited during training
            log.exception("the publisher failed")
            self._on_failure(ArealError(f"no more weights are published: {type(error).__name__}: {error}"))
            raise
        finally:
            own_failure.close()
            async with self._active:
                self._active.notify_all()

    async def _push_if_needed(self, step: int, snapshot: Snapshot) -> None:
        # Only eligible servers count. A server that backs off stays behind: if it counted, every retry would
        # use up a version and make the other servers recompute their caches for nothing. acquire() returns
        # False if a newer snapshot exists; the newer snapshot's offer wakes the task again.
        if self._any_behind(self._broadcaster.eligible(self._servers())) and snapshot.acquire():
            try:
                await self._push(step, snapshot)
            finally:
                snapshot.release()

    async def _push(self, step: int, snapshot: Snapshot) -> None:
        version = await self._version_for(step, snapshot)
        started_s = time.monotonic()
        servers = {receiver_id(server): server for server in self._servers()}
        outcome = await self._broadcaster.push(
            snapshot, version=version, step=step, servers=list(servers.values())
        )
        self._unused = None if outcome.is_requested else (snapshot, version)
        self._num_own_failures = self._num_own_failures + 1 if outcome.own_failure else 0
        traffic = outcome.traffic
        report = PushReport(
            version=version,
            step=step,
            num_activated=len(outcome.activated),
            failed=outcome.failed,
            num_bytes=sum(bucket.num_bytes for bucket in snapshot.buckets),
            whole_bytes=traffic.whole_bytes,
            delta_bytes=traffic.delta_bytes,
            changed_fraction=(traffic.num_changed / traffic.num_compared if traffic.num_compared else None),
            seconds=time.monotonic() - started_s,
            staging_seconds=outcome.staging_s,
            broadcast_seconds=outcome.broadcast_s,
            stall_seconds=max((reply.stall_seconds for reply in outcome.activated.values()), default=0.0),
            num_senders=self._broadcaster.num_senders,
            recovery_seconds=max(outcome.recovery_s.values(), default=0.0),
        )
        for name, reason in outcome.failed.items():
            log.warning("push of version %d to %s failed: %s", version, name, reason)
        if outcome.activated:
            earlier = {key: active for key, active in self._activated_versions.items() if key in servers}
            now_active = {key: version for key in servers if key[0] in outcome.activated}
            self._activated_versions = earlier | now_active
            self._distrusted = (self._distrusted & servers.keys()) - now_active.keys()
            if self.checks is not None:
                self.checks.keep_only(set(servers))
                for key in now_active:
                    self.checks.activated(key, step=step, version=version)
            async with self._active:
                self.active_step, self.active_version = step, version
                self._active.notify_all()
        self._on_push(report)

    async def _version_for(self, step: int, snapshot: Snapshot) -> int:
        """A version that no server has seen."""
        if self._unused is not None and self._unused[0] is snapshot:
            return self._unused[1]
        granted: VersionGranted = await self._call(AllocVersion(step=step), timeout_s=_CALL_TIMEOUT_S)
        self._newest_version = granted.version
        return granted.version

    def _push_again(self, receiver: ReceiverId) -> None:
        """Marks a server's weights as unknown: the newest weights are pushed once more, all bytes of them."""
        self._distrusted.add(receiver)
        self._broadcaster.forget_base(receiver)
        self.directory_changed()

    def _any_behind(self, servers: list[ServerEntry]) -> bool:
        """True if one of these servers lacks the newest weights."""
        # A push that reached no server (a resumed trainer is often ready before its servers) leaves
        # `active_step` where it was: then every server that can be reached is behind.
        is_never_pushed = self._offered is not None and self.active_step < self._offered[0]
        reachable = [server for server in servers if server.state in ("serving", "quarantined")]
        return any(is_never_pushed or self._version_of(server) < self.active_version for server in reachable)

    def _version_of(self, server: ServerEntry) -> int:
        """The version that a server has active; -1 if its weights are unknown or of an earlier run."""
        is_distrusted = server.state == "quarantined" or receiver_id(server) in self._distrusted
        if is_distrusted or server.weights_version > self._newest_version:
            return -1
        # The directory is updated by heartbeats and so lags behind the server's own reply to a push.
        return max(server.weights_version, self._activated_versions.get(receiver_id(server), -1))
