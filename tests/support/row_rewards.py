"""A reward that depends on the row and on chance: easy rows are always solved, impossible ones never."""

from __future__ import annotations

import zlib
from typing import Any

EASY, MIDDLE, IMPOSSIBLE = "easy", "middle", "impossible"


def by_kind(completion: str, answer: Any, *, kind: str, **_: Any) -> float:
    """1 or 0; of a middle row's answers about half get 1."""
    if kind == MIDDLE:
        return float(zlib.crc32(completion.encode()) % 2)
    return float(kind == EASY)
