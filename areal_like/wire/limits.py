"""Limits on the texts and tables in a peer's messages, which the receiver keeps, logs and passes on.

The codec checks types; this module checks lengths: names become keys, rows and parts of the directory that
every rank gets, so they must stay short. A sender shortens texts that may be long (`shortened`); a receiver
refuses longer ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from areal_like.config.common import NAME, NAME_RULE
from areal_like.config.evaluation import MAX_SETS, SET_NAME
from areal_like.data.mixture import MAX_SOURCES
from areal_like.errors import RefusedError
from areal_like.wire.messages.consumer import CloseAdmission, TrainerHeartbeat
from areal_like.wire.messages.hello import Goodbye, Hello
from areal_like.wire.messages.producer import (
    AppendSession,
    FindSession,
    ReturnLeases,
    SampleFailed,
    ServerHeartbeat,
)

MAX_TEXT_CHARS = 2_000
"""Characters of reasons and error texts."""
MAX_SETTINGS_CHARS = 4_000
MAX_ADDRESS_CHARS = 300
MAX_WORD_CHARS = 64
"""Characters of fingerprints, states, devices, and keys of statistics."""
MAX_SESSION_CHARS = 100
"""Characters of a session's id: three numbers of 64 bits, and the number of a try."""
MAX_STATS = 256
"""Statistics in one message."""

MAX_WAITS = 16
"""Waits in one heartbeat."""
MAX_WAIT_CHARS = 500
"""Characters of a wait's name in a heartbeat: room for an agent's error text."""

MAX_STAT = 1e18
"""Largest magnitude of a statistic: sums over all peers must stay finite, because JSON and the wire have no
infinity. A larger one is clipped (`bounded_stats`) and is never a reason to refuse its sender, because many
depend on rewards."""

_PROCESS = re.compile(r"[0-9a-f]{32}")
_CONTENT = re.compile(r"([0-9a-f]{16})?")
_WEIGHTS_ADDRESS = re.compile(r"(tcp://[A-Za-z0-9._\[\]:%-]+:[1-9][0-9]{0,4})?")
SESSIONS_URL = re.compile(r"(https?://[A-Za-z0-9._\[\]:%-]+:[1-9][0-9]{0,4})?")
"""`Hello.sessions_url`; empty: none."""
_LIMITS: dict[type, dict[str, int]] = {
    Hello: {
        "job": MAX_WORD_CHARS,
        "model": MAX_WORD_CHARS,
        "tokenizer": MAX_WORD_CHARS,
        "dataset": MAX_WORD_CHARS,
        "content": MAX_WORD_CHARS,
        "eval_content": MAX_WORD_CHARS,
        "settings": MAX_SETTINGS_CHARS,
        "http_address": MAX_ADDRESS_CHARS,
        "weights_address": MAX_ADDRESS_CHARS,
        "sessions_url": MAX_ADDRESS_CHARS,
        "device": MAX_WORD_CHARS,
        "dtype": MAX_WORD_CHARS,
    },
    SampleFailed: {"error": MAX_TEXT_CHARS},
    ReturnLeases: {"reason": MAX_TEXT_CHARS},
    CloseAdmission: {"reason": MAX_TEXT_CHARS},
    TrainerHeartbeat: {"state": MAX_WORD_CHARS},
    AppendSession: {"session": MAX_SESSION_CHARS},
    FindSession: {"session": MAX_SESSION_CHARS},
}
"""Message -> text field -> most characters."""
_CHECKED = frozenset({*_LIMITS, ServerHeartbeat, TrainerHeartbeat, Goodbye})


def shortened(text: str, *, max_chars: int = MAX_TEXT_CHARS) -> str:
    """The text, or its beginning and the number of characters left out, in at most `max_chars`."""
    if len(text) <= max_chars:
        return text
    ending = f" ... ({len(text)} characters)"
    return text[: max_chars - len(ending)] + ending


def bounded_stats(stats: Mapping[str, float]) -> dict[str, float]:
    """The statistics clipped to `MAX_STAT`, without those that are not numbers."""
    return {
        name: min(max(float(value), -MAX_STAT), MAX_STAT)
        for name, value in stats.items()
        if not math.isnan(value)
    }


def check_lengths(message: Any) -> None:
    """Raises RefusedError for a text or table in a peer's message that is too long."""
    if type(message) not in _CHECKED:  # samples, acknowledgements and requests for groups
        return
    for name, max_chars in _LIMITS.get(type(message), {}).items():
        if (length := len(getattr(message, name))) > max_chars:
            raise RefusedError(name, f"has {length} characters: at most {max_chars} are accepted")
    if isinstance(message, Hello):
        _check_hello(message)
    elif isinstance(message, (ServerHeartbeat, TrainerHeartbeat, Goodbye)):
        _check_stats(message.stats)
    if isinstance(message, (ServerHeartbeat, TrainerHeartbeat)):
        _check_waits(message.waits)


def _check_hello(hello: Hello) -> None:
    if not NAME.fullmatch(hello.name):
        raise RefusedError("name", f"is not a name: {NAME_RULE}")
    if not _PROCESS.fullmatch(hello.process):
        raise RefusedError("process", "want 32 hexadecimal digits")
    # The trainer connects to it, and libzmq knows other transports and options of the source address.
    if not SESSIONS_URL.fullmatch(hello.sessions_url):
        raise RefusedError("sessions_url", "want http://host:port or https://host:port")
    if not _WEIGHTS_ADDRESS.fullmatch(hello.weights_address):
        raise RefusedError("weights_address", "want tcp://host:port")
    num_sources = len(hello.source_sizes)
    if num_sources > MAX_SOURCES or num_sources != len(hello.source_weights):
        raise RefusedError("source_sizes", f"want at most {MAX_SOURCES}, and as many weights")
    for name in ("content", "eval_content"):
        if not _CONTENT.fullmatch(getattr(hello, name)):
            raise RefusedError(name, "want 16 hexadecimal digits, or nothing")
    numbers = {
        "incarnation": hello.incarnation,
        "weights_version": hello.weights_version,
        "rank": hello.rank,
    }
    for name, number in numbers.items():
        if number < 0:
            raise RefusedError(name, "is negative")
    if len(hello.eval_sets) > MAX_SETS or not all(map(SET_NAME.fullmatch, hello.eval_sets)):
        raise RefusedError("eval_sets", f"at most {MAX_SETS} sets with valid names are accepted")
    if min(hello.eval_sets.values(), default=0) < 0:
        raise RefusedError("eval_sets", "has a negative number")


def _check_stats(stats: Mapping[str, float]) -> None:
    if len(stats) > MAX_STATS or any(len(key) > MAX_WORD_CHARS for key in stats):
        raise RefusedError(
            "stats", f"at most {MAX_STATS} statistics with keys of {MAX_WORD_CHARS} characters are accepted"
        )


def _check_waits(waits: Mapping[str, float]) -> None:
    if len(waits) > MAX_WAITS or any(len(name) > MAX_WAIT_CHARS for name in waits):
        raise RefusedError(
            "waits", f"at most {MAX_WAITS} waits with names of {MAX_WAIT_CHARS} characters are accepted"
        )
    if not all(0 <= seconds <= MAX_STAT for seconds in waits.values()):
        raise RefusedError("waits", f"want times from 0 to {MAX_STAT:g} s")
