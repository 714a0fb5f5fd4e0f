"""Frames between a server and its worker processes: a 4-byte little-endian length and msgpack.

A worker gets its socket as stdin, and moves it away before it runs a task's code, so that code which prints
or reads stdin cannot corrupt it.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import msgpack

HEADER = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """The frame of a message. A character that UTF-8 has no bytes for (a lone surrogate) becomes `?`."""
    body = msgpack.packb(message, unicode_errors="replace")
    assert isinstance(body, bytes)
    return HEADER.pack(len(body)) + body


def claim_stdin() -> socket.socket:
    """Moves the socket that is descriptor 0 to another; stdin becomes /dev/null, stdout becomes stderr."""
    claimed = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return claimed
