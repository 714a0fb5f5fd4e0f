"""Frames between a server and its worker processes: a 4-byte little-endian length and msgpack.

The worker's ends of its streams are moved away from descriptors 0 and 1 before it runs a task's code, so that
code which prints or reads stdin cannot corrupt them.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import msgpack

HEADER = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """The frame of a message. A character that UTF-8 has no bytes for (a lone surrogate) becomes `?`."""
    body = msgpack.packb(message, unicode_errors="replace")
    assert isinstance(body, bytes)
    return HEADER.pack(len(body)) + body


def claim_standard_streams() -> tuple[int, int]:
    """Moves descriptors 0 and 1 to new ones, which are returned; stdin becomes /dev/null, stdout stderr."""
    claimed = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return claimed
