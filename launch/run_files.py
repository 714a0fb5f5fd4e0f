"""Reads a run's files: JSON, its configuration, its ledger.

A file may be absent, cut short by a crash, or written by another release.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from areal_like.errors import ConfigError
from areal_like.security.redaction import without_secrets

MAX_BYTES = 16 << 20
"""Largest file that is read whole."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        value = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_lines(path: Path, *, max_bytes: float = math.inf) -> Iterator[Any]:
    """The JSON value of each line of a file, one by one; None for a damaged line. Empty without the file.

    `max_bytes`: number of bytes of the file that are read.
    """
    try:
        file = path.open(errors="replace")
    except OSError:
        return
    with file:
        num_bytes = 0
        for line in file:
            num_bytes += len(line)
            if num_bytes > max_bytes:
                return
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of metrics.jsonl, one by one: there may be millions. Ends with None at a damaged line."""
    for row in json_lines(path):
        if row is None:
            yield None
            return
        yield row if isinstance(row, dict) else {}


def read_config(path: Path) -> dict[str, Any]:
    """A stored configuration as plain values, unchecked and without secrets. Raises ConfigError."""
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not the configuration of a run")
    return without_secrets({str(key): value for key, value in plain.items()})


def tail(path: Path, *, max_bytes: int) -> str:
    """The last bytes of a file as text, without an incomplete first line; empty without the file."""
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


def unix_time(value: Any) -> float | None:
    """A Unix time that a calendar has, or None for anything else."""
    found = number(value)
    return found if found is not None and 0 <= found < 1e11 else None
