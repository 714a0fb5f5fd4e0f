"""Streams of events over HTTP, both ends: server-sent events, and frames of msgpack.

    text/event-stream          data: {json} LF LF ... data: [DONE] LF LF
    application/msgpack        [u32 length, list of events] ... [u32 0]

Frames are the packed form of `POST /generate`, which the embedded engine offers in addition to SGLang's JSON:

    request:   Content-Type: application/msgpack    the same object; a prompt may be bytes
    response:  Accept: application/msgpack          a stream of frames, each with a list of events

An event has SGLang's fields, but `output_ids` and `output_token_logprobs` are bytes. Bytes are int32 and
float32, little-endian, so a log-prob arrives exactly as the engine computed it. Encoding and parsing tokens
with log-probs as text costs several times as much.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.wire.unpacking import unpack

EVENTS = "text/event-stream"
FRAMES = "application/msgpack"
END_OF_EVENTS = b"data: [DONE]\n\n"
_LENGTH = struct.Struct("<I")
END_OF_FRAMES = _LENGTH.pack(0)
MAX_EVENT_BYTES = 64 << 20
_TOKENS = np.dtype("<i4")
_LOGPROBS = np.dtype("<f4")


def encode_event(event: Mapping[str, Any], *, name: str = "") -> bytes:
    """One server-sent event. `name`: its type, in a line of its own; empty: none."""
    line = b"event: " + name.encode() + b"\n" if name else b""
    return line + b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def encode_frame(events: Sequence[object]) -> bytes:
    """One frame. A character that UTF-8 has no bytes for (a lone surrogate) becomes `?`."""
    body: bytes = msgpack.packb(events, unicode_errors="replace")
    return _LENGTH.pack(len(body)) + body


async def read_events(
    pieces: AsyncIterable[bytes], *, max_bytes: int = MAX_EVENT_BYTES
) -> AsyncIterator[Any]:
    """Yields the content of each `data: {json}` line until `data: [DONE]`; other lines are skipped.

    Raises ValueError for an event that is too long or not JSON.
    """
    buffered = bytearray()
    async for piece in pieces:
        buffered += piece
        if len(buffered) > max_bytes:
            raise ValueError(f"event longer than {max_bytes} bytes")
        if b"\n" not in piece:
            continue
        *lines, rest = bytes(buffered).split(b"\n")
        buffered = bytearray(rest)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


async def read_frames(
    pieces: AsyncIterable[bytes], *, max_bytes: int = MAX_EVENT_BYTES
) -> AsyncIterator[Any]:
    """Yields the events of frames until the frame without content.

    Raises ValueError for a frame that is too long or not a list.
    """
    buffered = bytearray()
    async for piece in pieces:
        buffered += piece
        start = 0
        while len(buffered) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffered, start)
            if size > max_bytes:
                raise ValueError(f"frame longer than {max_bytes} bytes")
            if size == 0:
                return
            end = start + _LENGTH.size + size
            if len(buffered) < end:
                break
            events = unpack(bytes(buffered[start + _LENGTH.size : end]))
            if not isinstance(events, list):
                raise ValueError("frame is not a list")
            start = end
            for event in events:
                yield event
        del buffered[:start]


def pack_tokens(tokens: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Packs token ids. Raises OverflowError or ValueError for a value that is not an int32."""
    return np.asarray(tokens, dtype=_TOKENS).tobytes()


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Packs log-probs. They were float32 before they became Python floats, so nothing is lost."""
    return np.asarray(logprobs, dtype=_LOGPROBS).tobytes()


def unpack_tokens(content: bytes) -> NDArray[np.int32]:
    """Unpacks token ids. Raises ValueError if the bytes are not whole tokens."""
    return np.frombuffer(content, dtype=_TOKENS).astype(np.int32, copy=False)


def unpack_logprobs(content: bytes) -> NDArray[np.float32]:
    """Unpacks log-probs. Raises ValueError if the bytes are not whole log-probs."""
    return np.frombuffer(content, dtype=_LOGPROBS).astype(np.float32, copy=False)


async def disconnected(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Returns when the client of an ASGI request has disconnected; the body must have been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass
