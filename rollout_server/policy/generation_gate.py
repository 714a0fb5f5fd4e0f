"""Counts running requests, limits their number, and can hold new ones back for updates of an idle engine."""

from __future__ import annotations

import asyncio
from collections import deque


class GenerationGate:
    """Every request is made inside `async with gate`. A `drain` update holds it and waits until it is empty.

    OPEN -> hold() -> HELD (requests inside finish, new ones wait) -> release() -> OPEN

    Waiting requests enter in order of arrival.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._limit: int | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._empty = asyncio.Event()
        self._empty.set()
        self.num_inside = 0
        """Number of requests at the engine."""
        self._busy_s = self._request_s = self._counted_s = 0.0

    async def __aenter__(self) -> None:
        if not self._waiting and self._has_room():
            self._enter()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was admitted, but its task was cancelled before it ran
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def seconds(self) -> tuple[float, float]:
        """Returns the time with at least one request at the engine, and the time at the engine summed over
        requests."""
        self._count()
        return self._busy_s, self._request_s

    def set_limit(self, limit: int | None) -> None:
        """Sets the maximum number of requests inside; None: any number. Those already inside stay."""
        self._limit = limit
        self._let_in()

    def hold(self) -> None:
        self._is_held = True

    def release(self) -> None:
        """Lets waiting and new requests through."""
        self._is_held = False
        self._let_in()

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def _has_room(self) -> bool:
        return not self._is_held and (self._limit is None or self.num_inside < self._limit)

    def _count(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self.num_inside:
            self._busy_s += now_s - self._counted_s
            self._request_s += self.num_inside * (now_s - self._counted_s)
        self._counted_s = now_s

    def _enter(self) -> None:
        self._count()
        self.num_inside += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._count()
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._has_room():
            turn = self._waiting.popleft()
            if not turn.done():  # otherwise its task was cancelled
                self._enter()
                turn.set_result(None)
