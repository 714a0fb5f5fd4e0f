"""Listening sockets of the HTTP servers."""

from __future__ import annotations

import socket


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address (port 0: a free one), to be passed to an HTTP server.

    Raises OSError.
    """
    # The protocol is explicit because only then does asyncio turn off Nagle's algorithm. With Nagle, a
    # response (two writes: head and body) waits about 40 ms for the acknowledgement of its head.
    listener = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
