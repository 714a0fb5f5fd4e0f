"""Counts running requests and can hold new ones back, for updates that need an idle engine."""

from __future__ import annotations

import asyncio


class GenerationGate:
    """Every request is made inside `async with gate`. A `drain` update holds it and waits until it is empty.

    OPEN -> hold() -> HELD (requests inside finish, new ones wait) -> release() -> OPEN
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.num_inside = 0
        """Requests at the engine."""

    async def __aenter__(self) -> None:
        await self._open.wait()
        self.num_inside += 1
        self._empty.clear()

    async def __aexit__(self, *exc: object) -> None:
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()

    def hold(self) -> None:
        """Makes new requests wait."""
        self._open.clear()

    def release(self) -> None:
        """Lets waiting and new requests through."""
        self._open.set()

    async def wait_empty(self) -> None:
        """Waits until no request is at the engine."""
        await self._empty.wait()
