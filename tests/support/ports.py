"""Ports that only the test's own servers get.

A port that was chosen, closed and bound again later may have gone to another process in between.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port of the loopback at which nothing listens.

    A server with SO_REUSEADDR may bind it, as those of asyncio, aiohttp and ZeroMQ do; the system gives it to
    nobody else.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
