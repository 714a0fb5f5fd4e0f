"""Parses request bodies, whose size the server has checked, and checks their fields.

Each function here checks one field, and raises UserError with the field's name, the allowed values and the
given one. The server turns a UserError into status 400, so a handler need not handle errors of its fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from areal_like.errors import UserError
from areal_like.wire.unpacking import unpack

MAX_TIMEOUT_S = 86400.0


def parse_body(content: bytes) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object. Raises UserError."""
    try:
        body = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    return body


def parse_packed_body(content: bytes) -> dict[str, Any]:
    """As `parse_body`, for msgpack."""
    try:
        body = unpack(content)
    except ValueError as error:
        raise UserError(f"the body is not msgpack that is accepted here: {error}") from None
    if not isinstance(body, dict):
        raise UserError("the body must be a map")
    return body


def number(
    body: Mapping[str, Any],
    name: str,
    default: float,
    *,
    low: float,
    high: float = math.inf,
    integer: bool = False,
) -> float:
    """A number from `low` to `high`; `default` where the field is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if integer else "a number"
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:.12g}"
        raise UserError(f"{name} must be {kind} {bound}, got {value!r}")
    return value


def required_integer(body: Mapping[str, Any], name: str, *, high: int = 1 << 20) -> int:
    """An integer from 0 to `high`, without a default."""
    value = body.get(name)
    if type(value) is not int or not 0 <= value <= high:
        raise UserError(f"{name} must be an integer between 0 and {high}, got {value!r}")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A boolean; false where the field is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")
    return bool(value)


def text(body: Mapping[str, Any], name: str, default: str = "") -> str:
    """A string that is not empty; required where `default` is empty."""
    value = body.get(name, default)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a non-empty string, got {value!r}")
    return value


def timeout(body: Mapping[str, Any], default_s: float) -> float:
    """`timeout_s`, above 0 and at most a day."""
    timeout_s = body.get("timeout_s", default_s)
    if (
        isinstance(timeout_s, bool)
        or not isinstance(timeout_s, (int, float))
        or not 0 < timeout_s <= MAX_TIMEOUT_S
    ):
        raise UserError(f"timeout_s must be a number of seconds up to {MAX_TIMEOUT_S:g}, got {timeout_s!r}")
    return float(timeout_s)


def weight_version(body: Mapping[str, Any]) -> str:
    """`weight_version` as a string; empty where the body has none.

    SGLang's versions are strings, ours are numbers.
    """
    value = body.get("weight_version")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise UserError(f"weight_version must be a string, got {value!r}")
    return "" if value is None else str(value)


def secret(body: Mapping[str, Any]) -> str:
    """`secret`: 32 bytes in hexadecimal; empty where the body has none."""
    value = body.get("secret", "")
    if not isinstance(value, str) or (value and re.fullmatch(r"[0-9a-f]{64}", value) is None):
        raise UserError("secret must be 64 hexadecimal digits")  # its value stays out of logs
    return value


def integrity(body: Mapping[str, Any]) -> str:
    """`integrity`: `none` (the default) or `sha256`."""
    value = body.get("integrity", "none")
    if value not in ("none", "sha256"):
        raise UserError(f"integrity must be none or sha256, got {value!r}")
    return str(value)


def recompute(body: Mapping[str, Any]) -> bool:
    """`running`: true if the KV of running sequences is recomputed under the new weights (the default)."""
    running = body.get("running", "recompute")
    if running not in ("recompute", "keep"):
        raise UserError(f"running must be recompute or keep, got {running!r}")
    return bool(running == "recompute")
