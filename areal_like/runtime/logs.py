"""Logging of one process: JSON lines in the run's `logs/` directory, short plain lines on stderr.

Lines have a limit, and so has the number of lines from one place in the code: what a peer sends must not fill
the disk. On SIGHUP the files are opened again (`signals.py`), after logrotate has renamed them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from areal_like.config import Config
from areal_like.paths import RunPaths

exit_log = logging.getLogger("areal_like.runtime.exit")
"""Logger of the reason why a process ends. It does not write to stderr: `exit_code_of` writes that line
itself, without time and level."""

MAX_LINE_CHARS = 8_000
"""Characters of a message in the log; the rest is left out."""
MAX_TRACE_CHARS = 64_000
"""Characters of a traceback in the log; its beginning is left out."""
_BURST, _PER_S = 200, 10.0
"""Lines from one place in the code at once, and per second after that."""


class JsonFormatter(logging.Formatter):
    """Formats each log entry as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Keys: time (Unix seconds), level, logger, message; `exception` (the traceback) if there is one."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": _shortened(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[-MAX_TRACE_CHARS:]
        if stacks := getattr(record, "stacks", ""):
            entry["stacks"] = stacks[:MAX_TRACE_CHARS]
        return json.dumps(entry)


class PlainFormatter(logging.Formatter):
    """Formats each log entry as one short line; the traceback is only in the log file."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """Time of day, daemon, level, message."""
        time_of_day = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{time_of_day} {self._name} {record.levelname} {_shortened(record)}"


class RateLimit:
    """A filter that lets through _BURST lines of one place in the code, then _PER_S per second.

    The next line that gets through says how many were left out. Lines of `exit_log` always get through.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, int], tuple[float, float, int]] = {}
        """(file, line) -> (lines left, at this time, lines left out). As many as there are log calls."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the line may be written."""
        return record.name == exit_log.name or self._admits(record, now_s=time.monotonic())

    def _admits(self, record: logging.LogRecord, *, now_s: float) -> bool:
        place = (record.pathname, record.lineno)
        left, since_s, num_left_out = self._places.get(place, (float(_BURST), now_s, 0))
        left = min(float(_BURST), left + _PER_S * (now_s - since_s))
        if left < 1:
            self._places[place] = (left, now_s, num_left_out + 1)
            return False
        if num_left_out:
            record.msg = f"{_shortened(record)} ({num_left_out} such lines were left out)"
            record.args = ()
        self._places[place] = (left - 1, now_s, 0)
        return True


class ReopenedFile(logging.FileHandler):
    """A log file that can be opened again under its name."""

    def reopen(self) -> None:
        """Closes the file and opens the one that has its name now. Not from a signal handler."""
        self.acquire()
        try:
            self.close_stream()
            self.stream = self._open()
        finally:
            self.release()

    def close_stream(self) -> None:
        """Closes the file without ending the handler."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.flush()
            stream.close()


def configure_logging(config: Config, name: str) -> None:
    """Logs JSON lines to `<run>/logs/<name>.log`, and plain warnings to stderr (on a terminal, INFO too)."""
    paths = RunPaths.of(config)
    paths.logs.mkdir(parents=True, exist_ok=True)
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(PlainFormatter(name))
    plain.addFilter(lambda record: record.name != exit_log.name)
    plain.addFilter(RateLimit())
    plain.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    configure_handlers(log_file(paths.logs / f"{name}.log"), plain, level=config.daemon.log_level)


def log_file(path: Path) -> ReopenedFile:
    """A handler that writes JSON lines to a file."""
    file = ReopenedFile(path)
    file.setFormatter(JsonFormatter())
    file.addFilter(RateLimit())
    return file


def configure_handlers(*handlers: logging.Handler, level: str) -> None:
    """Makes these the handlers of the process."""
    logging.basicConfig(level=level, handlers=handlers, force=True)


OUTPUT_FILE = "AREAL_LIKE_OUTPUT_FILE"
"""Environment variable with the file that a process's stdout and stderr go to, if its parent opened one."""


def reopen_logs() -> None:
    """Opens the process's log files again, stdout and stderr too if its parent has given them a file."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ReopenedFile):
            handler.reopen()
    if path := os.environ.get(OUTPUT_FILE):
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


def _shortened(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if len(message) <= MAX_LINE_CHARS:
        return message
    return f"{message[:MAX_LINE_CHARS]} ... ({len(message)} characters)"
