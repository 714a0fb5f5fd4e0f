"""The packed form of `POST /generate`, which the embedded engine offers beside SGLang's JSON.

    request:  Content-Type: application/msgpack    the same object; a prompt may be bytes
    answer:   Accept: application/msgpack          a stream of frames, each with a list of events

An event has SGLang's fields, but `output_ids` and `output_token_logprobs` are bytes. Bytes are int32 and
float32, little-endian, so a log-prob arrives as the engine computed it. A frame without content ends the
stream. As text, a token with its log-prob is encoded and parsed at several times the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rollout_server.frames import HEADER

MEDIA_TYPE = "application/msgpack"
END_OF_FRAMES = HEADER.pack(0)
_TOKENS = np.dtype("<i4")
_LOGPROBS = np.dtype("<f4")


def pack_tokens(tokens: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Raises OverflowError or ValueError for what is not an int32."""
    return np.asarray(tokens, dtype=_TOKENS).tobytes()


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Log-probs that were float32 before they were Python's floats: nothing is lost."""
    return np.asarray(logprobs, dtype=_LOGPROBS).tobytes()


def unpack_tokens(content: bytes) -> NDArray[np.int32]:
    """Raises ValueError if the bytes are not whole tokens."""
    return np.frombuffer(content, dtype=_TOKENS).astype(np.int32, copy=False)


def unpack_logprobs(content: bytes) -> NDArray[np.float32]:
    """Raises ValueError if the bytes are not whole log-probs."""
    return np.frombuffer(content, dtype=_LOGPROBS).astype(np.float32, copy=False)
