"""Reads JSON that a run has written; it may be absent, cut short by a crash, or of another release."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20
"""Of a file that is read whole."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file, of its last MAX_BYTES; other lines are left out."""
    found = []
    for line in tail(path, max_bytes=MAX_BYTES).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def tail(path: Path, *, max_bytes: int) -> str:
    """The last bytes of a file as text, without the line that they begin within; empty without the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            data = file.read(max_bytes)
    except OSError:
        return ""
    if size > max_bytes:
        data = data.partition(b"\n")[2]
    return data.decode(errors="replace")


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, empty for anything else."""
    return value if isinstance(value, dict) else {}
