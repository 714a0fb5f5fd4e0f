"""Parses request bodies, whose size the server has already checked, and checks their fields.

Each function here checks one field, and raises ParamError with the field's name, the allowed values and the
given one. The servers turn a UserError into status 400, so a handler need not handle errors of its fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from areal_like.errors import UserError
from areal_like.wire.unpacking import unpack

D = TypeVar("D", int, None)

_MAX_DEPTH = 64
MAX_CONTAINERS = 1 << 17
"""Limit of objects and lists in a body: 30 for each message, at the maximum number of messages. A body of
nothing else would become fifty times as large in memory."""
_NOT_UNICODE = "the body is not UTF-8, or has half of a surrogate pair"


class ParamError(UserError):
    """A field of a body is wrong."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


def parse_object(content: bytes) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object. Raises UserError, also for halves of
    surrogate pairs, which no response could repeat."""
    try:
        text = content.decode("utf-8-sig")
        body = json.loads(text) if text else {}
        _refuse_halves(text, body)
    except UnicodeError:
        raise UserError(_NOT_UNICODE) from None
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    return _object(body)


def parse_bounded_object(content: bytes) -> dict[str, Any]:
    """Parses a body that is rendered and encoded again. Like `parse_object`, but also refuses NaN,
    deep nesting and very many objects."""
    try:
        text = content.decode()
    except UnicodeError:
        raise UserError(_NOT_UNICODE) from None
    _check_containers(text)
    try:
        raw = json.loads(text, parse_constant=_refuse_constant) if text else {}
        _refuse_halves(text, raw)
    except UnicodeError:
        raise UserError(_NOT_UNICODE) from None
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON (which has no NaN and no Infinity)") from None
    body = _object(raw)
    _check_depth(body)
    return body


def parse_packed_object(content: bytes) -> dict[str, Any]:
    """The body as a map of msgpack. Raises UserError."""
    try:
        body = unpack(content)
    except ValueError as error:
        raise UserError(f"the body is not msgpack that is accepted here: {error}") from None
    if not isinstance(body, dict):
        raise UserError("the body must be a map")
    return body


def number(
    body: Mapping[str, Any], name: str, default: float, *, low: float, high: float = math.inf
) -> float:
    """A number from `low` to `high`; `default` where the field is absent or null."""
    value: float = _bounded(body, name, default, low=low, high=high, kinds=(int, float), kind="a number")
    return value


def integer(body: Mapping[str, Any], name: str, default: D, *, low: float, high: float = math.inf) -> int | D:
    """An integer from `low` to `high`; `default` where the field is absent or null."""
    value: int | D = _bounded(body, name, default, low=low, high=high, kinds=int, kind="an integer")
    return value


def required_integer(body: Mapping[str, Any], name: str, *, high: int = 1 << 20) -> int:
    """An integer from 0 to `high`, without a default."""
    if body.get(name) is None:
        raise ParamError(f"{name} must be an integer between 0 and {high}, got None", param=name)
    return integer(body, name, 0, low=0, high=high)


def _bounded(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    *,
    low: float,
    high: float,
    kinds: type[int] | tuple[type[int], type[float]],
    kind: str,
) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:.12g}"
        raise ParamError(f"{name} must be {kind} {bound}, got {value!r}", param=name)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A boolean; false where the field is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ParamError(f"{name} must be true or false, got {value!r}", param=name)
    return bool(value)


def text(body: Mapping[str, Any], name: str, default: str = "") -> str:
    """A string that is not empty; required where `default` is empty."""
    value = body.get(name, default)
    if not isinstance(value, str) or not value:
        raise ParamError(f"{name} must be a non-empty string, got {value!r}", param=name)
    return value


def one_of(body: Mapping[str, Any], name: str, allowed: Sequence[str]) -> str:
    """One of the allowed strings; the first of them where the field is absent."""
    value = body.get(name, allowed[0])
    if value not in allowed:
        raise ParamError(f"{name} must be one of {', '.join(allowed)}, got {value!r}", param=name)
    return str(value)


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


def _refuse_halves(text: str, parsed: Any) -> None:
    """Raises UnicodeError for halves of surrogate pairs. `parsed`: what was parsed from `text`."""
    if "\\ud" in text or "\\uD" in text:
        json.dumps(parsed, ensure_ascii=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _check_containers(text: str) -> None:
    """Raises UserError for a body of very many objects and lists."""
    if _num_containers([text]) > MAX_CONTAINERS:
        pieces = text.replace("\\\\", "").replace('\\"', "").split('"')
        if _num_containers(pieces[::2]) > MAX_CONTAINERS:  # between the strings
            raise UserError(f"the body has more than {MAX_CONTAINERS} objects and lists")


def _num_containers(texts: list[str]) -> int:
    return sum(text.count("[") + text.count("{") for text in texts)


def _check_depth(body: dict[str, Any]) -> None:
    """Raises UserError for nesting that templates and encoders would recurse into too deeply."""
    level: list[Any] = [body]
    for _ in range(_MAX_DEPTH):
        level = [
            value
            for one in level
            for value in (one.values() if isinstance(one, dict) else one)
            if isinstance(value, (dict, list))
        ]
        if not level:
            return
    raise UserError(f"the body is nested more than {_MAX_DEPTH} levels deep")
