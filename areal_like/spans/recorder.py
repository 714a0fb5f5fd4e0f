"""Records a daemon's spans on disk for `areal-like trace`, in two files that are used in turn.

Each daemon appends JSON lines to `runs/NAME/spans/<daemon>.jsonl`. When the file has half of the allowed size
it replaces `<daemon>.old.jsonl`. So the newest spans are always there, the size is bounded, and a process
that is killed loses less than a second. Lines are of four kinds:

    {"daemon": "trainer-0", "host": ..., "pid": ..., "began_s": ...}    a process, and at the top of each file
    {"offset_s": ..., "rtt_s": ...}                                     its clock against the first buffer's
    [start, seconds, lane, name, arguments]                             a span; a lane is a row of the trace
    [time, "name", value]                                               a counter has a value from now on

Times are Unix seconds of this process: the clock is read once and advanced by the monotonic clock, so that
setting the clock during the run does not move spans. A process has one recorder (`start`), as with `logging`,
because the code that records is spread over all parts of a daemon. Without a recorder nothing is recorded. On
a full disk recording pauses until there is space again, and nothing fails. The durations of a lane's spans
also go to its listener (`listen`), for a histogram, also without a recorder. Recording is thread-safe. At
most MAX_PER_S lines a second are kept; a counter shows how many were left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)

MAX_PER_S = 1000
"""Spans and values in a second, each."""
_FLUSH_S = 0.5
_SHORTEST_S = 1e-4
"""Shortest phase of a step that is recorded, in seconds."""
_OFFSET_S = 10.0
"""Interval at which a better estimate of the clock's offset is written."""
_RETRY_S = 30.0
"""Interval at which a file that could not be written is reopened."""
_MAX_TEXT = 200
_NUM_KEPT = 32
"""Round trips from which the clock's offset is estimated."""

_as_json = json.JSONEncoder(separators=(",", ":"), default=str).encode
"""`json.dumps` would make an encoder for each span."""

_BASE_S = time.time() - time.monotonic()


def unix_now() -> float:
    """Unix time by this process: it never jumps."""
    return _BASE_S + time.monotonic()


class ClockOffset:
    """The offset of this process's clock against the buffer's, from the round trips of heartbeats. Pure.

    A heartbeat carries the sender's time, and its reply both that time and the buffer's. If both directions
    take equally long, the buffer's time was read in the middle of the round trip; the error is at most half
    of it. So the estimate comes from the shortest of the last round trips (as in NTP's clock filter, RFC
    5905, section 10).
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_NUM_KEPT)

    def heard(self, *, sent_s: float, buffer_s: float, now_s: float) -> tuple[float, float] | None:
        """(seconds to add to this process's times, round trip), or None if the reply has no usable times.

        `sent_s`, `now_s`: by this process; `buffer_s`: by the buffer, which is not trusted to be a number.
        """
        rtt_s = now_s - sent_s
        if not (math.isfinite(buffer_s) and math.isfinite(sent_s) and buffer_s > 0 and 0 <= rtt_s < 60):
            return None
        self._samples.append((rtt_s, buffer_s - (sent_s + now_s) / 2))
        rtt_s, offset_s = min(self._samples, key=lambda one: one[0])
        return offset_s, rtt_s


class SpanRecorder:
    """The files of one daemon."""

    def __init__(self, directory: Path, daemon: str, *, max_bytes: int) -> None:
        self._path = directory / f"{daemon}.jsonl"
        self._old = directory / f"{daemon}.old.jsonl"
        self._half = max_bytes // 2
        self._head = {
            "daemon": daemon,
            "host": platform.node(),
            "pid": os.getpid(),
            "began_s": round(unix_now(), 6),
        }
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._retry_s = math.inf
        """When to reopen the file after an error."""
        self._num_bytes = 0
        self._flushed_s = self._second_s = time.monotonic()
        self._num_in_second = self._num_left_out = 0
        self._offset: dict[str, float] | None = None
        self._offset_s = -_OFFSET_S
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            self._give_up(error)

    def span(self, lane: str, name: str, *, start_s: float, end_s: float, **arguments: Any) -> None:
        """Records a span between two times of the monotonic clock."""
        start, seconds = round(_BASE_S + start_s, 6), round(end_s - start_s, 6)
        self._write([start, seconds, lane[:_MAX_TEXT], name[:_MAX_TEXT], arguments])

    def value(self, name: str, value: float) -> None:
        """Records the value of a counter now."""
        self._write([round(unix_now(), 6), name[:_MAX_TEXT], value])

    def offset(self, *, offset_s: float, rtt_s: float) -> None:
        """Records the seconds to add to this process's times to get the buffer's, and the round trip of the
        estimate."""
        now_s = time.monotonic()
        if now_s - self._offset_s < _OFFSET_S:
            return
        self._offset_s, self._offset = now_s, {"offset_s": round(offset_s, 6), "rtt_s": round(rtt_s, 6)}
        self._write(self._offset)

    def close(self) -> None:
        with self._lock:
            file, self._file, self._retry_s = self._file, None, math.inf
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk
                    file.close()

    def _write(self, entry: Any) -> None:
        line = _as_json(entry) + "\n"
        with self._lock:
            now_s = time.monotonic()
            if self._file is None and not self._opens_again(now_s=now_s):
                return
            assert self._file is not None
            if now_s - self._second_s >= 1:
                if self._num_left_out:
                    at = [round(_BASE_S + self._second_s, 6), "spans left out", self._num_left_out]
                    line = _as_json(at) + "\n" + line
                self._second_s, self._num_in_second, self._num_left_out = now_s, 0, 0
            self._num_in_second += 1
            if self._num_in_second > MAX_PER_S:
                self._num_left_out += 1
                return
            try:
                self._file.write(line)
                self._num_bytes += len(line)
                if self._num_bytes > self._half:
                    self._file.close()
                    self._path.replace(self._old)
                    self._open()
                if now_s - self._flushed_s > _FLUSH_S:
                    self._flushed_s = now_s
                    self._file.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _open(self) -> None:
        self._file = self._path.open("a")
        # The previous line may have been cut off by a full disk.
        head = (
            "\n" * bool(self._file.tell())
            + json.dumps(self._head)
            + "\n"
            + (json.dumps(self._offset) + "\n" if self._offset else "")
        )
        self._file.write(head)
        self._file.flush()  # a full disk fails here
        self._num_bytes = self._file.tell()

    def _opens_again(self, *, now_s: float) -> bool:
        if now_s < self._retry_s:
            return False
        try:
            self._open()
        except OSError as error:
            self._give_up(error)
            return False
        self._retry_s = math.inf
        log.warning("spans are recorded again (%s)", self._path)
        return True

    def _give_up(self, error: Exception) -> None:
        file, self._file = self._file, None
        is_first, self._retry_s = self._retry_s == math.inf, time.monotonic() + _RETRY_S
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
        if is_first:
            log.warning("no spans are recorded until this can be written (%s): %s", self._path, error)


_recorder: SpanRecorder | None = None
_listeners: dict[str, Callable[[float], None]] = {}


def start(directory: Path, daemon: str, *, max_bytes: int) -> None:
    """Starts recording the spans of this process; with `max_bytes` 0 none are recorded."""
    global _recorder
    stop()
    if max_bytes > 0:
        _recorder = SpanRecorder(directory, daemon, max_bytes=max_bytes)


def stop() -> None:
    """Ends the recording."""
    global _recorder
    if _recorder is not None:
        _recorder.close()
        _recorder = None


def listen(lane: str, listener: Callable[[float], None]) -> None:
    """Calls `listener(seconds)` for each span of a lane, in the thread that records it."""
    _listeners[lane] = listener


def observe(lane: str, seconds: float) -> None:
    """Passes a duration that is not a span to the listener of a lane."""
    if (listener := _listeners.get(lane)) is not None:
        listener(seconds)


def record(lane: str, name: str, *, start_s: float, end_s: float | None = None, **arguments: Any) -> None:
    """Records a span from `start_s` to `end_s` (now), both of the monotonic clock."""
    listener = _listeners.get(lane)
    if _recorder is None and listener is None:
        return
    end_s = time.monotonic() if end_s is None else end_s
    if listener is not None:
        listener(end_s - start_s)
    if _recorder is not None:
        _recorder.span(lane, name, start_s=start_s, end_s=end_s, **arguments)


def count(name: str, value: float) -> None:
    """Records the value of a counter."""
    if _recorder is not None:
        _recorder.value(name, value)


def note_offset(*, offset_s: float, rtt_s: float) -> None:
    if _recorder is not None:
        _recorder.offset(offset_s=offset_s, rtt_s=rtt_s)


def record_phase(phase: str, step: int, start_s: float) -> None:
    """Records a phase of a trainer's step that ends now; one that took no time is left out."""
    if (end_s := time.monotonic()) - start_s > _SHORTEST_S:
        record("step", phase, start_s=start_s, end_s=end_s, step=step)
