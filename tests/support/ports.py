"""Ports for servers that have to be told theirs before they start."""

from __future__ import annotations

import contextlib
import random
import socket

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
