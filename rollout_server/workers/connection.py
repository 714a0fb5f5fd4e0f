"""The server's end of one worker's socket: one call at a time, each with a time limit.

    STARTING -> IDLE <-> CALLING
        `---------`--------`---> LOST (time limit, end of the process, an invalid frame)

A protocol instead of streams: at hundreds of calls a second their tasks and locks would cost more than the
call. The time limit belongs to the call and not to its caller: a caller that is cancelled leaves the call in
progress, and the worker can be closed in order when it has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from areal_like.errors import EpisodeError
from areal_like.wire.unpacking import unpack
from rollout_server.environments.exchange import MAX_ANSWER_BYTES
from rollout_server.frames import HEADER, pack

_REAP_DELAY_S = 0.3
"""Wait between the end of a worker's stream and its loss: the zygote reports why it has ended."""


class WorkerConnection(asyncio.Protocol):
    """The calls to one worker. `on_lost` is called once, when it can serve no more."""

    def __init__(self, number: int, *, on_lost: Callable[[WorkerConnection], None]) -> None:
        self.number = number
        self.lost: EpisodeError | None = None
        """Why it can serve no more; None while it can."""
        self.call_since_s: float | None = None
        """Time of the loop at which the call in progress began."""
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[Any] | None = None
        self._limit: asyncio.TimerHandle | None = None

    async def call(self, request: Any, *, timeout_s: float | None, timed_out: EpisodeError) -> Any:
        """The value that the worker answers.

        Raises EpisodeError if the environment raised or the worker is lost; after `timeout_s` the worker is
        lost because of `timed_out` (None: its caller limits the time). If the caller is cancelled, the call
        goes on (see `settled`).
        """
        if self.lost is not None:
            raise self.lost
        assert self._answer is None and self._transport is not None
        frame = pack(request)
        answer = self._answer = self._loop.create_future()
        self.call_since_s = self._loop.time()
        if timeout_s is not None:
            self._limit = self._loop.call_later(timeout_s, self.lose, timed_out)
        self._transport.write(frame)
        value, error = await asyncio.shield(answer)
        if error:
            raise EpisodeError(str(error))
        return value

    async def settled(self) -> None:
        """Waits until no call is in progress. Raises EpisodeError if the worker is lost."""
        if self._answer is not None:
            await asyncio.shield(self._answer)
        if self.lost is not None:
            raise self.lost

    def lose(self, reason: EpisodeError) -> None:
        """Fails the call in progress and closes the socket. Later calls do nothing."""
        if self.lost is not None:
            return
        self.lost = reason
        if self._transport is not None:
            self._transport.abort()
        if (answer := self._take_answer()) is not None:
            answer.set_exception(reason)
            answer.exception()  # its caller may be gone
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
            if size > MAX_ANSWER_BYTES:
                self.lose(EpisodeError(f"the environment's process sent a frame of {size} bytes"))
            elif len(self._received) < end:
                return
            else:
                body = bytes(memoryview(self._received)[HEADER.size : end])
                del self._received[:end]
                self._take(body)

    def connection_lost(self, error: Exception | None) -> None:
        if self.lost is None:
            closed = EpisodeError("the environment's process closed its socket")
            self._loop.call_later(_REAP_DELAY_S, self.lose, closed)

    def _take(self, body: bytes) -> None:
        try:
            value, _, error = unpack(body)
        except (ValueError, TypeError) as invalid:
            self.lose(EpisodeError(f"the environment's process sent an invalid frame: {invalid}"))
            return
        answer = self._take_answer()
        if answer is None:
            self.lose(EpisodeError("the environment's process sent a frame that nobody asked for"))
        else:
            answer.set_result((value, error))

    def _take_answer(self) -> asyncio.Future[Any] | None:
        """Ends the call in progress; its future, if there is a call."""
        answer, self._answer = self._answer, None
        self.call_since_s = None
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        return answer
