"""Caches rows on disk as Arrow files that all processes of a machine memory-map, and selections of rows.

    <cache>/rows/<name>.arrow        columns `row` (a row's JSON) and `number` (its line in the source)
    <cache>/rows/<name>.json         name of the source, and SHA-256 of the rows; written last
    <cache>/rows/hashes/<path>.json  SHA-256 of a file, with the size and times it had then
    <cache>/rows/<name>.npy          a selection: the numbers of the rows that a task uses, in order, 64-bit
    <cache>/rows/by/<key>.json       the selection that a filter has made; the key is over all it depends on

An entry is named by the hash of the bytes it was made from, so a changed file has a new entry, and a running
job keeps the rows that it started with. Entries are written under a temporary name and renamed. If several
processes build the same entry at the same time, the last one wins, with the same bytes. Entries are never
removed; the directory can be deleted while no job runs.

Worker processes use the selection of the server that started them, and a filter that takes seconds, such as
counting the tokens of all prompts, runs once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.data.reading import Text, file_hash, load_hub, texts_of_file, texts_of_hub
from areal_like.data.sources import HubSource
from areal_like.errors import ConfigError
from areal_like.paths import cache_dir, replacing, write_json

_LAYOUT = 1
"""Part of the entries' names, so that entries of another layout are not found."""
_BATCH_BYTES = 1 << 20
_SETTLED_S = 1.0
"""The hash of a file that was written less than this ago is not remembered: it may change again within the
resolution of its times."""
_NAME = re.compile(r"[0-9a-f]{32}")
Numbers = NDArray[np.int64]
"""A selection."""


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """An open Arrow file."""

    name: str
    """The name under which `open_entry` finds it."""
    table: Any
    """A memory-mapped `pyarrow.Table`."""
    label: str
    """Name of the file or data set, for messages."""
    content: str
    """SHA-256 of the rows' texts."""


def directory() -> Path:
    """The directory with all files of this package."""
    return cache_dir() / "rows"


def entry_of(source: Path | HubSource, *, key: str) -> CachedRows:
    """The entry with the rows of a source; reads the source if there is none yet. Raises ConfigError."""
    if isinstance(source, HubSource):
        dataset = load_hub(source, key=key)
        name = _name("hub", source.label, str(dataset._fingerprint))
        return _found(name, key=key) or _built(
            name, texts_of_hub(dataset, label=f"{key}: {source.label}"), label=source.label, key=key
        )
    try:
        digest = remembered_hash(source)
        name = _name(source.suffix.lower(), source.name, digest)
        entry = _found(name, key=key)
        if entry is None:
            entry = _built(name, texts_of_file(source, key=key), label=source.name, key=key)
            if file_hash(source) != digest:
                _path(name).with_suffix(".json").unlink()
                raise ConfigError(f"{key}: {source} changed while it was read: start again")
    except OSError as error:
        raise ConfigError(f"{key}: {source} cannot be read: {error}") from error
    return entry


def open_entry(name: str, *, key: str) -> CachedRows:
    """The entry of this name. Raises ConfigError if it was removed."""
    entry = _found(name, key=key) if _NAME.fullmatch(name) else None
    if entry is None:
        raise ConfigError(f"{key}: {_path(name)} was removed while the job runs: start its servers again")
    return entry


def _path(name: str) -> Path:
    return directory() / f"{name}.arrow"


def _name(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_LAYOUT, *parts]).encode()).hexdigest()[:32]


def _found(name: str, *, key: str) -> CachedRows | None:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"{key} needs an extra: pip install 'areal-like[data]' ({error})") from error
    path = _path(name)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        return CachedRows(name=name, table=table, label=about["label"], content=about["sha256"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        # ArrowInvalid is a ValueError.
        return None
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} cannot be read: {error}; XDG_CACHE_HOME names another directory"
        ) from error


def _built(name: str, texts: Iterator[Text], *, label: str, key: str) -> CachedRows:
    """Writes the entry, a few megabytes at a time."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            content = _write(partial, texts)
        write_json(path.with_suffix(".json"), {"label": label, "sha256": content})
    except OSError as error:
        raise ConfigError(
            f"{key}: the rows of {label} cannot be stored in {path.parent}: {error}; XDG_CACHE_HOME names "
            "another directory"
        ) from error
    entry = _found(name, key=key)
    if entry is None:
        raise ConfigError(f"{key}: {path} was removed while it was made: start again")
    return entry


def _write(path: Path, texts: Iterator[Text]) -> str:
    """SHA-256 of the rows, each with its length before it."""
    import pyarrow

    schema = pyarrow.schema([("row", pyarrow.binary()), ("number", pyarrow.int64())])
    digest = hashlib.sha256()
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as out:
        for rows, numbers in _batched(texts):
            for row in rows:
                digest.update(len(row).to_bytes(8, "little") + row)
            out.write_batch(pyarrow.record_batch([rows, numbers], schema=schema))
    return digest.hexdigest()


def _batched(texts: Iterator[Text]) -> Iterator[tuple[list[bytes], list[int]]]:
    rows: list[bytes] = []
    numbers: list[int] = []
    num_bytes = 0
    for row, number in texts:
        rows.append(row)
        numbers.append(number)
        num_bytes += len(row)
        if num_bytes >= _BATCH_BYTES:
            yield rows, numbers
            rows, numbers, num_bytes = [], [], 0
    if rows:
        yield rows, numbers


def remembered_hash(path: Path) -> str:
    """SHA-256 of a file, from the cache if its size and times have not changed since."""
    stat = path.stat()
    times = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    remembered = directory() / "hashes" / f"{digest}.json"
    try:
        known = json.loads(remembered.read_text())
        if known["times"] == times:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = file_hash(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S:
        with contextlib.suppress(OSError):
            write_json(remembered, {"times": times, "sha256": sha256})
    return sha256


def store_selection(numbers: Numbers) -> str:
    """Writes a selection; returns its name. Raises ConfigError if it cannot be written."""
    data = np.ascontiguousarray(numbers, np.int64)
    name = hashlib.sha256(data.tobytes()).hexdigest()[:32]
    path = _selection_path(name)
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
    """The selection of this name, memory-mapped. Raises ConfigError if it was removed."""
    path = _selection_path(name)
    try:
        if not _NAME.fullmatch(name):
            raise ValueError("not the name of a selection")
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
        raise ConfigError(
            f"{key}: {path} was removed while the job runs: start its servers again ({error})"
        ) from error
    assert isinstance(numbers, np.ndarray)
    return numbers


def remembered(key: Any, make: Callable[[], Numbers]) -> Numbers:
    """The selection that `make` returned for this key earlier; calls `make` if there is none.

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
    with contextlib.suppress(OSError):
        write_json(path, {"selection": name})
    return numbers


def _selection_path(name: str) -> Path:
    return directory() / f"{name}.npy"
