"""Reads the log files of a run as entries with a time, in bounded memory even for files of gigabytes.

A daemon writes JSON lines (`<daemon>.log`, and `.log.1` and so on after a rotation, the oldest with the
largest number). Its output (`.out`) and the engines' logs are plain text. A plain line without a time gets
the time of the line before it, or at the beginning of a file the time of the file's last change. Output lines
that are also in the daemon's own log are left out.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from launch.formatting import typed_seconds
from launch.run_files import unix_time

MAX_LINE_BYTES = 1 << 18
"""Longest line that is read; a longer one is cut."""
_BLOCK_BYTES = 1 << 20
"""Bytes at the end of a plain file that are read for `--since`, and the step, in bytes, at which a daemon's
log is sampled for times."""
_OFFSET_BYTES = 1 << 16
"""Bytes at the beginning of a daemon's spans that are read for its clock offset."""
_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
LEVELS = tuple(_LEVELS)
_OWN_LINE = re.compile(r"\d\d:\d\d:\d\d \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
"""Lines from `PlainFormatter`, which are also in the log file."""
_STAMP = re.compile(r"\[?(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?")
_HEADER = re.compile(r" (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ ")
"""Level and logger after the time stamp in a line of the embedded engine; they are cut, as entries show
them."""
_TROUBLE = re.compile(r"error|exception|traceback|fatal|critical|abort|segmentation", re.IGNORECASE)
_WARNING = re.compile(r"warn", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Entry:
    """One entry of a log; ordered by time."""

    unix_s: float
    source: str
    level: str = field(compare=False)
    text: str = field(compare=False)
    """The message, then the lines of a traceback if there is one."""

    def is_at_least(self, level: str) -> bool:
        """True if its level is `level` or above."""
        return _LEVELS.get(self.level, 20) >= _LEVELS[level]


@dataclass(frozen=True)
class LogFiles:
    """The files of one log, the oldest first."""

    name: str
    """The daemon, or `<server>-engine`."""
    files: tuple[Path, ...]
    is_json: bool
    offset_s: float = 0.0
    """Added to its times, which come from another machine's clock."""

    def entries(
        self, *, since_unix_s: float | None, num_last: int | None, ends: Mapping[Path, int]
    ) -> Iterator[Entry]:
        """Yields the entries since a time, or at least the last `num_last` (fewer if there are fewer), or
        all.

        `ends`: the offset at which to stop, by file.
        """
        for file, start in self._starts(since_unix_s, num_last):
            for entry in self.read(file, start, ends.get(file)):
                if since_unix_s is None or entry.unix_s >= since_unix_s:
                    yield entry

    def read(self, path: Path, start: int = 0, end: int | None = None) -> Iterator[Entry]:
        """The entries of one of its files from byte `start` on."""
        try:
            with path.open("rb") as file:
                parser = LineParser(self, unix_s=path.stat().st_mtime)
                file.seek(start)
                while (end is None or file.tell() < end) and (line := file.readline(MAX_LINE_BYTES)):
                    if (entry := parser.entry(line)) is not None:
                        yield entry
        except FileNotFoundError:
            return  # it was rotated away or removed

    def _starts(self, since_unix_s: float | None, num_last: int | None) -> Iterator[tuple[Path, int]]:
        """(file, first byte to read) of each file that has entries to show."""
        chosen: list[tuple[Path, int]] = []
        if since_unix_s is not None:
            since_unix_s -= self.offset_s
        left = num_last
        for path in reversed(self.files):
            try:
                with path.open("rb") as file:
                    size, start = file.seek(0, 2), 0
                    if since_unix_s is not None:
                        if path.stat().st_mtime < since_unix_s:
                            break
                        start = _before(file, size, since_unix_s, is_json=self.is_json)
                    elif left is not None:
                        start, num_found = _last_lines(file, size, left)
                        left -= num_found
            except FileNotFoundError:
                continue
            chosen.append((path, start))
            if left is not None and left <= 0:
                break
        yield from reversed(chosen)


class LineParser:
    """Turns the lines of one file into entries."""

    def __init__(self, source: LogFiles, *, unix_s: float) -> None:
        """`unix_s`: time of lines before the first one with a time."""
        self._source, self._unix_s = source, unix_s

    def entry(self, line: bytes) -> Entry | None:
        """The entry of a line; None if it has nothing to show."""
        text = line.decode(errors="replace").rstrip()
        if not text:
            return None
        if self._source.is_json:
            return self._from_json(text)
        if _OWN_LINE.match(text):
            return None
        level = ""
        if (stamp := _STAMP.match(text)) is not None:
            self._unix_s = _unix_s(stamp) or self._unix_s
            if (header := _HEADER.match(text, stamp.end())) is not None:
                text, level = text[header.end() :], header[1]
        if not level:
            level = "ERROR" if _TROUBLE.search(text) else "WARNING" if _WARNING.search(text) else "INFO"
        return Entry(self._unix_s + self._source.offset_s, self._source.name, level, text)

    def _from_json(self, text: str) -> Entry | None:
        try:
            raw = json.loads(text)
            unix_s, level, message = unix_time(raw["time"]), str(raw["level"]), str(raw["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            unix_s = None
        if unix_s is None:
            # The line was cut by a crash or by MAX_LINE_BYTES, or a daemon's code has written it.
            return Entry(self._unix_s + self._source.offset_s, self._source.name, "INFO", text)
        self._unix_s = unix_s
        parts = [message, *(str(raw[key]) for key in ("exception", "stacks") if raw.get(key))]
        return Entry(unix_s + self._source.offset_s, self._source.name, level, "\n".join(parts))


def find_sources(logs: Path, roles: Sequence[str]) -> list[LogFiles]:
    """The logs of a run, or those of `roles`: a daemon with its engine, or all daemons of a kind."""
    families: dict[tuple[str, bool], list[tuple[int, Path]]] = {}
    for path in logs.iterdir() if logs.is_dir() else ():
        match = re.fullmatch(r"(.+?)\.(log|out)(?:\.(\d{1,6}))?", path.name)
        if match is None or not path.is_file():
            continue
        name, kind, number = match[1], match[2], int(match[3] or 0)
        is_json = kind == "log" and not name.endswith("-engine")
        if not roles or any(name == role or name.startswith(f"{role}-") for role in roles):
            families.setdefault((name, is_json), []).append((number, path))
    return [
        LogFiles(
            name,
            tuple(path for _, path in sorted(files, reverse=True)),
            is_json,
            _clock_offset_s(logs.parent / "spans", name.removesuffix("-engine")),
        )
        for (name, is_json), files in sorted(families.items())
    ]


def _clock_offset_s(spans: Path, daemon: str) -> float:
    """The daemon's estimate of its clock's offset from the first buffer's clock; 0 if they agree.

    It is read from the first lines of the daemon's spans: the estimate with the shortest round trip, if that
    is shorter than the offset.
    """
    for path in (spans / f"{daemon}.jsonl", spans / f"{daemon}.old.jsonl"):
        found: list[tuple[float, float]] = []
        try:
            with path.open("rb") as file:
                lines = file.read(_OFFSET_BYTES).splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(b'{"offset_s"'):
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    estimate = json.loads(line)
                    found.append((abs(float(estimate["rtt_s"])), float(estimate["offset_s"])))
        if found:
            rtt_s, offset_s = min(found)
            return offset_s if rtt_s < abs(offset_s) < 1e9 else 0.0
    return 0.0


def _unix_s(stamp: re.Match[str]) -> float | None:
    try:
        when = datetime.fromisoformat(f"{stamp[1]} {stamp[2]}").timestamp()
    except (ValueError, OverflowError):
        return None
    return when + float(f"0.{stamp[3]}") if stamp[3] else when


def _before(file: BinaryIO, size: int, since_unix_s: float, *, is_json: bool) -> int:
    """Offset of a line older than the given time, or 0. Searches backwards from the end, because times in a
    log ascend, at least nearly. In a plain file: offset of the last block."""
    start = size
    while start > 0:
        start = max(0, start - _BLOCK_BYTES)
        file.seek(start)
        if start:
            file.readline(MAX_LINE_BYTES)
        offset = file.tell()
        unix_s = _time_of(file.readline(MAX_LINE_BYTES)) if is_json else -math.inf
        if unix_s is not None and unix_s < since_unix_s:
            return offset
    return 0


def _time_of(line: bytes) -> float | None:
    try:
        return float(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _last_lines(file: BinaryIO, size: int, num_lines: int) -> tuple[int, int]:
    """(offset of the last `num_lines` lines, how many there are), read from the end in blocks."""
    if num_lines <= 0:
        return size, 0
    num_found, end = 0, size
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        block = file.read(end - start)
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            if start + at + 1 < size:  # not the newline that ends the file
                num_found += 1
                if num_found == num_lines:
                    return start + at + 1, num_found
        end = start
    return 0, num_found + bool(size)


def complete_bytes(path: Path) -> int:
    """Offset of the end of the last complete line of a file, or of the file if its last line is very long; 0
    without the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - MAX_LINE_BYTES)
            file.seek(start)
            newline = file.read(size - start).rfind(b"\n")
    except FileNotFoundError:
        return 0
    return start + newline + 1 if newline >= 0 else size


def since_time(text: str, *, now_unix_s: float) -> float:
    """The time that `90s`, `10m`, `2h`, `1d` (ago), `12:30` (today) or `2026-01-31 12:30` means.

    Raises ValueError.
    """
    if text.endswith(("s", "m", "h", "d")):
        return now_unix_s - typed_seconds(text)
    if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", text):
        today = time.strftime("%Y-%m-%d", time.localtime(now_unix_s))
        return datetime.fromisoformat(f"{today} {text:0>5}").timestamp()
    return datetime.fromisoformat(text).timestamp()
