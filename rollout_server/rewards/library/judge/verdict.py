"""Parses a judge's reply. Pure.

Only the end of the reply counts: a JSON object at the end, or the last line. Quotations of the graded
completion come earlier. A reply without a verdict at its end is refused, and the judge is asked again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_THINKING_ENDS = "</think>"
_LAST_LINE = re.compile(
    r"[^\w-]*(?:(?:final|overall)\s+)?(?:(?:score|rating|grade|verdict)\b)?[^\w-]*"
    r"(?P<score>-?\d+(?:\.\d+)?)(?:\s*/\s*(?P<of>\d+(?:\.\d+)?))?\W*",
    re.IGNORECASE,
)
_MAX_LINE_CHARS = 200
_MAX_OBJECTS = 64
"""Maximum number of opening braces, from the end, at which the last JSON object is tried."""
_YES = {"yes": True, "true": True, "no": False, "false": False}


class NoVerdictError(ValueError):
    """The reply has no verdict. The message says what it has instead."""


def score_in(reply: str, *, lowest: float, highest: float) -> float:
    """Returns the score, from 0 (`lowest`) to 1 (`highest`). Raises NoVerdictError."""
    text = _after_thinking(reply)
    found = _last_object(text)
    value = found.get("score") if found is not None else None
    if found is None and (match := _LAST_LINE.fullmatch(_last_line(text))):
        value = float(match["score"])
        if match["of"] is not None and float(match["of"]) != highest:
            raise NoVerdictError(f"a score out of {match['of']} where the highest is {highest:g}")
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}(\.\d{1,9})?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise NoVerdictError(f"no score at the end: {_end_of(text)}")
    if not lowest <= value <= highest:
        raise NoVerdictError(f"a score of {str(value)[:20]}, outside {lowest:g} to {highest:g}")
    return (value - lowest) / (highest - lowest)


def verdicts_in(reply: str, *, num: int) -> Sequence[bool]:
    """Returns the verdicts on `num` criteria. Raises NoVerdictError."""
    text = _after_thinking(reply)
    found = _last_object(text)
    values = found.get("verdicts") if found is not None else None
    if not isinstance(values, list):
        raise NoVerdictError(f"no verdicts at the end: {_end_of(text)}")
    if len(values) != num:
        raise NoVerdictError(f"{len(values)} verdicts for {num} criteria")
    return [_as_bool(value) for value in values]


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    read = _YES.get(value.strip().lower()) if isinstance(value, str) else None
    if read is None:
        raise NoVerdictError(f"a verdict that is neither yes nor no: {str(value)[:40]!r}")
    return read


def _after_thinking(reply: str) -> str:
    text = reply.rpartition(_THINKING_ENDS)[2].rstrip()
    return text.removesuffix("```").rstrip()


def _last_line(text: str) -> str:
    return text.rpartition("\n")[2].strip()[-_MAX_LINE_CHARS:]


def _last_object(text: str) -> dict[str, Any] | None:
    """Returns the JSON object at the end of the text."""
    if not text.endswith("}"):
        return None
    start = len(text)
    for _ in range(_MAX_OBJECTS):
        start = text.rfind("{", 0, start)
        if start < 0:
            return None
        try:
            found = json.loads(text[start:])
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    return None


def _end_of(text: str) -> str:
    return repr(text[-100:]) if text else "the reply is empty"
