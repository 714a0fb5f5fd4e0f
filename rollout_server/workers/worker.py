"""A worker process as the server sees it: its socket, one call at a time with a time limit, and its end.

    STARTING -> IDLE <-> CALLING
        `---------`--------`---> LOST (time limit, end of the process, an invalid frame)

This is a protocol instead of streams, whose tasks and locks would cost more than the call itself at hundreds
of calls a second. The time limit belongs to the call and not to its caller: if the caller is cancelled, the
call stays in progress, and the worker can be closed properly once it has responded.

A reward worker gets many items at once (`send`), and its results are passed to `on_message`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from areal_like.errors import EnvironmentLostError, EpisodeError, RewardError
from areal_like.wire.unpacking import unpack
from rollout_server.environments.exchange import MAX_RESULT_BYTES
from rollout_server.frames import HEADER, pack

_REAP_DELAY_S = 0.3
"""Wait between the end of a worker's stream and its loss, in which the zygote reports why the worker
ended."""


@dataclass(frozen=True, kw_only=True)
class WorkerRole:
    """The kind of work that a worker does for the server."""

    name: str
    """Name in a worker's first frame."""
    process: str
    """Description in errors and logs."""
    failed: type[EpisodeError | RewardError]
    """Error raised for failures of the task's code."""
    lost: type[EpisodeError | RewardError]
    """Error raised if a process was lost for a reason other than the task's code."""
    max_bytes: int
    """Maximum frame size of a worker."""
    may_import: bool
    """True if a worker should import the task itself when the zygote's import does not survive a fork."""


ENVIRONMENT = WorkerRole(
    name="environment",
    process="the environment's process",
    failed=EpisodeError,
    lost=EnvironmentLostError,
    max_bytes=MAX_RESULT_BYTES,
    may_import=False,
)
"""One environment or `agent()` at a time. There may be hundreds, which share the memory of one import."""
REWARD = WorkerRole(
    name="reward",
    process="the reward process",
    failed=RewardError,
    lost=RewardError,
    max_bytes=64 << 20,
    may_import=True,
)
"""A queue of completions; a few workers (`rollout.reward_workers`)."""


class Worker(asyncio.Protocol):
    """One worker process. `on_lost` is called once, when it can no longer serve."""

    def __init__(
        self,
        number: int,
        role: WorkerRole,
        *,
        on_lost: Callable[[Worker], None],
        on_message: Callable[[Any], None] | None = None,
    ) -> None:
        """`on_message`: called with messages that are not responses to a call; raises ValueError or TypeError
        for invalid ones."""
        self.number = number
        self.role = role
        self.lost: EpisodeError | RewardError | None = None
        """Why it can no longer serve; None while it can."""
        self.call_since_s: float | None = None
        """Loop time at which the call in progress started."""
        self._on_lost = on_lost
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._result: asyncio.Future[Any] | None = None
        self._limit: asyncio.TimerHandle | None = None

    @property
    def is_connected(self) -> bool:
        """False once its socket is closed; the reason may be reported a moment later."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, frames: bytes) -> None:
        """Sends frames without waiting for responses."""
        assert self._transport is not None
        self._transport.write(frames)

    async def call(self, request: Any, *, timeout_s: float | None, timed_out: str) -> Any:
        """Calls the worker and returns the value of its response.

        Raises the role's `failed` if the task's code raised, and the reason if the worker is lost. After
        `timeout_s` it is lost because of `timed_out` (None: its caller limits the time). If the caller is
        cancelled, the call goes on (see `settled`).
        """
        if self.lost is not None:
            raise self.lost
        assert self._result is None
        frame = pack(request)
        result = self._result = self._loop.create_future()
        self.call_since_s = self._loop.time()
        if timeout_s is not None:
            self._limit = self._loop.call_later(timeout_s, self.fail, timed_out)
        self.send(frame)
        value, error = await asyncio.shield(result)
        if error:
            raise self.role.failed(str(error))
        return value

    async def settled(self) -> None:
        """Waits until no call is in progress. Raises the reason if the worker is lost."""
        if self._result is not None:
            await asyncio.shield(self._result)
        if self.lost is not None:
            raise self.lost

    def fail(self, reason: str) -> None:
        """Loses the worker because of what the task's code did."""
        self.lose(self.role.failed(reason))

    def lose(self, reason: EpisodeError | RewardError) -> None:
        """Fails the call in progress and closes the socket. Later calls do nothing."""
        if self.lost is not None:
            return
        self.lost = reason
        if self._transport is not None:
            self._transport.abort()
        if self._result is not None:
            result = self._end_call()
            result.set_exception(reason)
            result.exception()  # retrieves it, as the caller may be gone
        self._on_lost(self)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= HEADER.size and self.lost is None:
            (size,) = HEADER.unpack_from(self._received)
            end = HEADER.size + size
            if size > self.role.max_bytes:
                self.fail(f"{self.role.process} sent a frame of {size} bytes")
            elif len(self._received) < end:
                return
            else:
                body = bytes(memoryview(self._received)[HEADER.size : end])
                del self._received[:end]
                self._take(body)

    def connection_lost(self, error: Exception | None) -> None:
        if self.lost is None:
            self._loop.call_later(_REAP_DELAY_S, self.fail, f"{self.role.process} closed its socket")

    def _take(self, body: bytes) -> None:
        try:
            message = unpack(body)
            if self._result is not None:
                value, error = message
                self._end_call().set_result((value, error))
            elif self._on_message is not None:
                self._on_message(message)
            else:
                self.fail(f"{self.role.process} sent an unexpected frame")
        except (ValueError, TypeError) as invalid:
            self.fail(f"{self.role.process} sent an invalid frame: {invalid}")

    def _end_call(self) -> asyncio.Future[Any]:
        """Ends the call in progress and returns its future."""
        result, self._result = self._result, None
        assert result is not None
        self.call_since_s = None
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        return result
