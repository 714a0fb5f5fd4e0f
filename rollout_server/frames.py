"""Frames between a server and its worker processes: a 4-byte little-endian length and msgpack.

A worker moves its socket away from stdin before it runs a task's code, so that code that prints or reads
stdin cannot corrupt the stream.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack

HEADER = struct.Struct("<I")
MAX_ERROR_CHARS = 8_000
"""Characters of an error that are sent, as many as a line of the log has: a task may raise megabytes."""


def pack(message: Any) -> bytes:
    """Packs a message into a frame. A character that UTF-8 cannot encode (a lone surrogate) becomes `?`."""
    body = msgpack.packb(message, unicode_errors="replace")
    assert isinstance(body, bytes)
    return HEADER.pack(len(body)) + body


def read(receive: Callable[[int], bytes]) -> Any:
    """Reads the next message from a trusted peer. Raises EOFError at the end of the stream.

    `receive`: returns the given number of bytes, or fewer at the end.
    """
    header = receive(HEADER.size)
    body = receive(HEADER.unpack(header)[0]) if len(header) == HEADER.size else b""
    if not body:
        raise EOFError
    return unpack(body)


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[Any]:
    """Yields the messages of a trusted peer's stream until its end."""
    while True:
        try:
            (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            body = await reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        yield unpack(body)


def unpack(body: bytes) -> Any:
    """Unpacks a message from a trusted peer. Settings may have keys that are not strings (YAML: `{1: a}`)."""
    return msgpack.unpackb(body, strict_map_key=False)


def described(error: BaseException, *, note: str = "") -> str:
    """Returns the message of an exception raised by a task's code, and where it was raised."""
    message = traceback.format_exception_only(error)[-1].strip()[:MAX_ERROR_CHARS] + note
    places = traceback.extract_tb(error.__traceback__)
    return (
        f"{message} ({places[-1].filename}:{places[-1].lineno} in {places[-1].name})" if places else message
    )


def claim_stdin() -> socket.socket:
    """Moves the socket from descriptor 0 to another; stdin becomes /dev/null, stdout becomes stderr."""
    claimed = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return claimed
