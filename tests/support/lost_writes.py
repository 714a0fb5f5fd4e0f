"""A model of a disk after a power loss: writes without a later fsync may be missing, whole or in part.

`disk_shim.c` logs the file operations of a process. `Disk` replays such a log up to any point and then drops
unsynced operations: all of them, or a random choice of writes and names. Names are as volatile as bytes: only
after an fsync of the directory is a new file certain to exist and a removed file certain to be gone. POSIX
guarantees no more than this; file systems usually do.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_HEAD = struct.Struct("<cHQI")


def compile_shim(directory: Path) -> Path:
    """Compiles the shim to a shared library. Raises FileNotFoundError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    library = directory / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-lpthread"], check=True)
    return library


@dataclass(frozen=True, slots=True)
class Op:
    """One file operation of the log."""

    kind: str
    path: str
    offset: int
    data: bytes


def read_log(path: Path) -> list[Op]:
    """All logged operations, in order."""
    log, ops, at = path.read_bytes(), [], 0
    while at < len(log):
        kind, path_bytes, offset, num_bytes = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        name = log[at : at + path_bytes].decode()
        at += path_bytes
        ops.append(Op(kind.decode(), name, offset, log[at : at + num_bytes]))
        at += num_bytes
    return ops


@dataclass(eq=False)
class _File:
    """Synced contents, and the operations since the last fsync."""

    safe: bytearray = field(default_factory=bytearray)
    unsynced: list[Op] = field(default_factory=list)


class Disk:
    """The files under `directory`, rebuilt from the log."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._names: dict[str, _File] = {}
        self._safe_names: dict[str, _File] = {}

    def play(self, ops: Iterable[Op]) -> None:
        """Replays operations."""
        for op in ops:
            match op.kind:
                case "C":
                    self._names[op.path] = _File()
                case "U":
                    del self._names[op.path]
                case "W" | "T":
                    file = self._names.get(op.path)
                    # None: it was unlinked while open.
                    if file is not None:
                        file.unsynced.append(op)
                case "S" if op.path in self._names:
                    file = self._names[op.path]
                    for done in file.unsynced:
                        _apply(file.safe, done)
                    file.unsynced.clear()
                case "S":
                    self._sync_names(op.path)

    def lose_power(self, into: Path, *, survives: Callable[[], bool], rng: random.Random) -> None:
        """Writes the remaining files to another directory.

        `survives` decides on each write and each name that was not synced.
        """
        names = dict(self._safe_names)
        for path in sorted(self._names.keys() | self._safe_names.keys()):
            if self._names.get(path) is not self._safe_names.get(path) and survives():
                if path in self._names:
                    names[path] = self._names[path]
                else:
                    del names[path]
        for path, file in names.items():
            if path.endswith("-shm"):
                continue
            data = bytearray(file.safe)
            for op in file.unsynced:
                if survives():
                    torn = op.kind == "W" and rng.random() < 0.3
                    _apply(
                        data,
                        Op(op.kind, op.path, op.offset, op.data[: rng.randrange(len(op.data))])
                        if torn
                        else op,
                    )
            target = into / os.path.relpath(path, self._directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def _sync_names(self, directory: str) -> None:
        for path in self._names.keys() | self._safe_names.keys():
            if os.path.dirname(path) == directory:  # noqa: PTH120 - strings of a log
                if path in self._names:
                    self._safe_names[path] = self._names[path]
                else:
                    del self._safe_names[path]


def _apply(data: bytearray, op: Op) -> None:
    if op.kind == "T":
        del data[op.offset :]
        data.extend(bytes(op.offset - len(data)))
    else:
        data.extend(bytes(max(0, op.offset - len(data))))
        data[op.offset : op.offset + len(op.data)] = op.data
