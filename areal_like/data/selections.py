"""Selections of rows on disk: the numbers of the rows that a task uses, in order.

    <cache>/rows/<name>.npy      the numbers, 64-bit; named by their hash
    <cache>/rows/by/<key>.json   the selection that a filter has made; the key is over all that it depends on

So worker processes use the selection of the server that has started them, and a filter that takes seconds,
such as counting the tokens of all prompts, runs once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.data.cache import directory
from areal_like.errors import ConfigError
from areal_like.paths import replacing, write_json

Numbers = NDArray[np.int64]
_NAME = re.compile(r"[0-9a-f]{32}")


def store_selection(numbers: Numbers) -> str:
    """Writes a selection; returns its name. Raises ConfigError if it cannot be written."""
    data = np.ascontiguousarray(numbers, np.int64)
    name = hashlib.sha256(data.tobytes()).hexdigest()[:32]
    path = _path(name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, data, allow_pickle=False)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error}; XDG_CACHE_HOME names another directory"
        ) from error
    return name


def open_selection(name: str, *, key: str) -> Numbers:
    """The selection of this name, in mapped memory. Raises ConfigError if it was removed."""
    try:
        if not _NAME.fullmatch(name):
            raise ValueError("no name of a selection")
        numbers = np.load(_path(name), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
        raise ConfigError(
            f"{key}: {_path(name)} was removed while the job runs: start its servers again ({error})"
        ) from error
    assert isinstance(numbers, np.ndarray)
    return numbers


def remembered(key: Any, make: Callable[[], Numbers]) -> Numbers:
    """The selection that `make` returned when it was called with this key before, else now.

    `key`: JSON of everything that the selection depends on, the fingerprint of the rows included.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = directory() / "by" / f"{digest}.json"
    try:
        return open_selection(json.loads(path.read_text())["selection"], key="cache")
    except (OSError, ValueError, KeyError, TypeError):  # ConfigError is a ValueError
        pass
    numbers = make()
    name = store_selection(numbers)
    write_json(path, {"selection": name})
    return numbers


def _path(name: str) -> Path:
    return directory() / f"{name}.npy"
