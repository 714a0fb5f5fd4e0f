"""Rows on disk as Arrow files, which every process of a machine maps into memory.

    <cache>/rows/<name>.arrow        columns `row` (a row's JSON) and `number` (its line in the source)
    <cache>/rows/<name>.json         name of the source, and SHA-256 of the rows; written last
    <cache>/rows/hashes/<path>.json  SHA-256 of a file, with the size and times it had then

An entry is named by the hash of the bytes it was made from, so a file that has changed is another entry, and
a job goes on with the rows that it has started with. Entries are written under another name and renamed: of
processes that build the same one at the same time, the last one wins, with the same bytes. Nothing removes
entries; the directory can be deleted while no job runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.data.reading import Text, file_hash, load_hub, texts_of_file, texts_of_hub
from areal_like.data.sources import HubSource
from areal_like.errors import ConfigError
from areal_like.paths import cache_dir, replacing, write_json

_LAYOUT = 1
"""Part of the entries' names: entries of another layout are not found."""
_BATCH_BYTES = 1 << 20
_SETTLED_S = 1.0
"""The hash of a file that was written less than this ago is not remembered: it may change again within the
resolution of its times."""
_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An open Arrow file."""

    name: str
    """Under which `open_entry` finds it."""
    table: Any
    """`pyarrow.Table` in mapped memory."""
    label: str
    """Name of the file or data set, for messages."""
    content: str
    """SHA-256 of the rows' texts."""


def directory() -> Path:
    """Where everything of this package is kept."""
    return cache_dir() / "rows"


def entry_of(source: Path | HubSource, *, key: str) -> Entry:
    """The entry with the rows of a source; reads the source if there is none yet. Raises ConfigError."""
    if isinstance(source, HubSource):
        dataset = load_hub(source, key=key)
        name = _name("hub", source.label, str(dataset._fingerprint))
        return _found(name, key=key) or _built(
            name, texts_of_hub(dataset, label=f"{key}: {source.label}"), label=source.label, key=key
        )
    try:
        digest = _remembered_hash(source)
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


def open_entry(name: str, *, key: str) -> Entry:
    """The entry of this name. Raises ConfigError if it was removed."""
    entry = _found(name, key=key) if _NAME.fullmatch(name) else None
    if entry is None:
        raise ConfigError(f"{key}: {_path(name)} was removed while the job runs: start its servers again")
    return entry


def _path(name: str) -> Path:
    return directory() / f"{name}.arrow"


def _name(*parts: str) -> str:
    return hashlib.sha256(json.dumps([_LAYOUT, *parts]).encode()).hexdigest()[:32]


def _found(name: str, *, key: str) -> Entry | None:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"{key} needs an extra: pip install 'areal-like[data]' ({error})") from error
    path = _path(name)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        return Entry(name=name, table=table, label=about["label"], content=about["sha256"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        # ArrowInvalid is a ValueError.
        return None


def _built(name: str, texts: Iterator[Text], *, label: str, key: str) -> Entry:
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


def _remembered_hash(path: Path) -> str:
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
