"""Checks the HTTP responses of a job's daemons before the launcher and the commands use them.

Every rollout server can write an endpoint file and send any response from that address. Its texts must not
reach a terminal as escape sequences, and a value of the wrong type must not end the launcher: a value that
does not have the type that this release sends is left out, and the view has a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from areal_like.terminal_text import harmless_name, harmless_values

_MAX_DIGITS = 18
"""Most digits of an integer, such that it fits into 64 bits and converts to a float."""


def parsed_object(content: bytes) -> dict[str, Any]:
    """The JSON object in a response, with finite numbers only. Raises ValueError."""
    try:
        response = json.loads(content, parse_constant=_refused, parse_float=_finite, parse_int=_bounded)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(response, dict):
        raise ValueError("not an object")
    return response


def checked_status(response: Mapping[str, Any]) -> dict[str, Any]:
    """A daemon's /status with harmless texts, in which every entry that is used has its type."""
    status = _checked(harmless_object(response), _STATUS)
    # The tables may also be one level below (`find_table`).
    return {
        key: _checked(value, _STATUS) if isinstance(value, dict) and key not in _STATUS else value
        for key, value in status.items()
    }


def harmless_object(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with harmless texts; empty if it is nested too deeply."""
    try:
        return dict(harmless_values(dict(content)))
    except RecursionError:
        return {}


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is not a finite number")
    return number


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"{text:.40}... is too large")
    return int(text)


_Check = Callable[[Any], Any]
"""Returns the value, or None to leave it out."""


def _checked(entries: Mapping[str, Any], checks: Mapping[str, _Check]) -> dict[str, Any]:
    """The entries that pass their check; entries without a check are unchanged."""
    passed = {key: checks[key](value) if key in checks else value for key, value in entries.items()}
    return {key: value for key, value in passed.items() if value is not None}


def _is(kind: Any) -> _Check:
    return lambda value: value if isinstance(value, kind) else None


_text, _number, _object = _is(str), _is(int | float), _is(dict)


def _table(value: Any) -> dict[str, Any] | None:
    """A table of names and numbers."""
    if not isinstance(value, dict):
        return None
    return {key: number for key, number in value.items() if number is None or _number(number) is not None}


def _numbers(value: Any) -> dict[str, float] | None:
    """A table of names and numbers, without unknown numbers."""
    table = _table(value)
    return None if table is None else {key: number for key, number in table.items() if number is not None}


def _list_of(check: _Check) -> _Check:
    def checked(value: Any) -> list[Any] | None:
        if not isinstance(value, list):
            return None
        return [passed for passed in map(check, value) if passed is not None]

    return checked


def _cause(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or _number(value.get("seconds")) is None:
        return None
    names = ("on", "name", "what", "remedy")
    if not all(isinstance(value.get(name), str) for name in names):
        return None
    return value | {name: harmless_name(value[name]) for name in names}


def _why(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    checks = {"causes": _list_of(_cause), "effects": _list_of(_text), "bottleneck": _text}
    return {"causes": [], "effects": [], "bottleneck": ""} | _checked(value, checks)


def _peer(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    checks = dict.fromkeys(value, _number) | _PEER
    return _checked(value, checks)


def _change(value: Any) -> dict[str, Any] | None:
    wanted = {"step", "key", "value", "origin"}
    return value if isinstance(value, dict) and wanted <= value.keys() else None


_PEER: dict[str, _Check] = {
    **dict.fromkeys(("name", "role", "state", "http", "key"), _text),
    "stats": _numbers,
    "waits": _numbers,
    "quarantine": _object,
}
_STATUS: dict[str, _Check] = {
    **dict.fromkeys(("name", "role", "state", "not_ready", "closed_because", "failed_because"), _text),
    **dict.fromkeys(("step", "committed_steps", "newest_version", "max_staleness", "num_steps"), _number),
    **dict.fromkeys(("tickets", "drops", "counters", "lag_histogram"), _numbers),
    "rates": _table,
    "waiting_on": _numbers,
    "why": _why,
    "peers": _list_of(_peer),
    "changes": _list_of(_change),
    "cordoned": _list_of(_text),
}
