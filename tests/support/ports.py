"""Ports that have to be known before a server starts, and that nobody else takes in between."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator

_PORTS = range(10_000, 29_000)
"""Below those that Linux gives to connections and to servers that ask for any port: nobody takes one of these
by chance between this choice and its use."""


def free_ports(host: str = "127.0.0.1", num: int = 1) -> range:
    """That many ports in a row, all free; at random, because other tests choose at the same time."""
    draw = random.SystemRandom()
    while True:
        first = draw.randrange(_PORTS.start, _PORTS.stop - num)
        with contextlib.ExitStack() as bound:
            try:
                for port in range(first, first + num):
                    bound.enter_context(socket.create_server((host, port)))
            except OSError:
                continue
        return range(first, first + num)


def free_port() -> int:
    """A free port of 127.0.0.1."""
    return free_ports()[0]


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port of the loopback at which nothing listens, as long as the test needs it.

    A server with SO_REUSEADDR may bind it, as those of asyncio, aiohttp and ZeroMQ do; the system gives it to
    nobody else.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
