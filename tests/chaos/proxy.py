"""A TCP proxy for ZeroMQ that drops, delays, duplicates and reorders whole messages, and cuts connections.

It parses ZMTP (3.x, NULL) only far enough to find the ends of messages: 64 bytes of greeting, then frames of
`flags, length, body`. Commands (READY, PING, PONG) pass unchanged, so both ends keep their session and
routing ids, and a cut looks like a lost peer. A proxy of sockets (ROUTER to DEALER) was left out: one of its
two sides would never notice a cut.

Each direction of each connection has its own random generator, seeded by (seed, connection, direction), so
its n-th message gets the same fault in every run.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probability of each fault of a message; messages without a fault are delivered unchanged."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """The message is delivered after the next message."""
    delay: float = 0.0
    """The message is delivered up to `max_delay_s` later; other messages overtake it."""
    cut: float = 0.0
    """Both connections end at once, and the messages in them are lost."""
    max_delay_s: float = 0.2


class FaultProxy:
    """Listens on loopback at `port` and forwards to `target`, in a separate thread.

    Use it in a `with` block.
    """

    def __init__(self, target: Callable[[], str], *, faults: Faults, seed: int) -> None:
        """`target`: returns `host:port`; called for each connection, so that the listener may move."""
        self._target = target
        self.faults = faults
        """May be replaced at any time."""
        self._seed = seed
        self.fates: Counter[str] = Counter()
        """Number of messages so far by fate."""
        self._num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(5)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 24)

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine: asyncio would create another task per connection, and warn about it at the end.
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        number, self._num_connections = self._num_connections, self._num_connections + 1
        writers = [near_writer]
        try:
            host, port = self._target().rsplit(":", 1)
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
            writers.append(far_writer)
            ways = [
                asyncio.create_task(
                    self._pass_on(source, sink, rng=random.Random(f"{self._seed}/{number}/{way}"))
                )
                for way, source, sink in (("in", near_reader, far_writer), ("out", far_reader, near_writer))
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # nothing listens there now: the peer will connect again
            self.fates["refused"] += 1
        finally:
            for writer in writers:
                writer.transport.abort()

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, rng: random.Random
    ) -> None:
        """Forwards one direction until the connection ends or is cut."""
        left = _GREETING_BYTES
        # Forward the greeting piece by piece: each side waits for the other side's first bytes before it
        # sends the rest.
        while left:
            piece = await source.read(left)
            if not piece:
                return
            left -= len(piece)
            sink.write(piece)
        held: bytes | None = None
        while True:
            message, is_command = await _read_message(source)
            fate = "passed" if is_command else self._fate(rng)
            if not is_command:
                self.fates[fate] += 1
            match fate:
                case "cut":
                    return
                case "dropped":
                    continue
                case "delayed":
                    self._loop.call_later(rng.random() * self.faults.max_delay_s, _write, sink, message)
                    continue
                case "reordered" if held is None:
                    held = message
                    continue
                case "duplicated":
                    message += message
            sink.write(message)
            if held is not None and not is_command:
                sink.write(held)
                held = None
            await sink.drain()

    def _fate(self, rng: random.Random) -> str:
        faults, draw = self.faults, rng.random()
        for fate, probability in (
            ("dropped", faults.drop),
            ("duplicated", faults.duplicate),
            ("reordered", faults.reorder),
            ("delayed", faults.delay),
            ("cut", faults.cut),
        ):
            if draw < probability:
                return fate
            draw -= probability
        return "passed"


def _write(sink: asyncio.StreamWriter, message: bytes) -> None:
    if not sink.is_closing():
        sink.write(message)


async def _read_message(source: asyncio.StreamReader) -> tuple[bytes, bool]:
    """The bytes of one whole message or command, and True for a command.

    Raises IncompleteReadError at the end.
    """
    parts = []
    while True:
        flags = await source.readexactly(1)
        size = await source.readexactly(8 if flags[0] & _LONG else 1)
        parts += [flags, size, await source.readexactly(int.from_bytes(size))]
        if not flags[0] & _MORE:
            return b"".join(parts), bool(flags[0] & _COMMAND)
