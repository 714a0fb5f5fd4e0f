"""Logging of one process: JSON lines in the run's `logs/` directory, short plain lines on stderr.

The length of lines and the number of lines from one place in the code are limited: messages from a peer must
not fill the disk. On SIGHUP the files are reopened (`signals.py`), after logrotate has renamed them.

The size of every file is limited too (`daemon.log_max_mb`, `daemon.log_backups`). A file of JSON lines is
renamed when it is full. The output of a process and the log of an engine cannot be renamed, because
libraries, torchrun and SGLang's own processes hold the open file. They are copied and truncated, which needs
no cooperation from the writers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from areal_like.config import Config
from areal_like.config.job import DaemonConfig
from areal_like.errors import ArealError
from areal_like.paths import RunPaths
from areal_like.terminal_text import harmless

log = logging.getLogger(__name__)
exit_log = logging.getLogger("areal_like.runtime.exit")
"""Logger of the reason why a process ends. It does not write to stderr: `exit_code_of` writes that line
itself, without time and level."""
exit_log.addHandler(logging.NullHandler())  # without any handler `logging` would write to stderr

MAX_LINE_CHARS = 8_000
"""Characters of a message in the log; the rest is left out."""
MAX_TRACE_CHARS = 64_000
"""Characters of a traceback in the log; its beginning is left out."""
_BURST, _PER_S = 200, 10.0
"""Lines from one place in the code at once, and per second after that."""
_ADMITTED = "areal_is_admitted"
"""Attribute of a line for which `RateLimit` has decided."""


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
        """Time of day, daemon, level, message, which is harmless on a terminal."""
        time_of_day = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{time_of_day} {self._name} {record.levelname} {harmless(_shortened(record))}"


class RateLimit:
    """A filter that lets through _BURST lines of one place in the code, then _PER_S per second.

    The next line that gets through says how many were left out. Lines of `exit_log` always get through. Of
    several handlers, the first one that gets a line decides for all.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, int], tuple[float, float, int]] = {}
        """(file, line) -> (lines left, at this time, lines left out). Bounded by the number of log calls in
        the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the line may be written."""
        if not hasattr(record, _ADMITTED):
            is_admitted = record.name == exit_log.name or self._admits(record, now_s=time.monotonic())
            setattr(record, _ADMITTED, is_admitted)
        return bool(getattr(record, _ADMITTED))

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


@dataclass(frozen=True, kw_only=True)
class LogBounds:
    """Limits of one log file. Its copies are `<file>.1` (the newest), `<file>.2` and so on."""

    max_bytes: int = 0
    """A file that has reached this size is rotated; 0: never."""
    num_backups: int = 1
    """Copies that are kept."""

    @classmethod
    def of(cls, daemon: DaemonConfig) -> LogBounds:
        return cls(max_bytes=round(daemon.log_max_mb * 1e6), num_backups=daemon.log_backups)

    def is_full(self, num_bytes: int) -> bool:
        """True if a file of this size must be rotated."""
        return 0 < self.max_bytes <= num_bytes

    def make_room(self, path: Path) -> Path:
        """Shifts the copies by one and deletes the oldest; returns the free name of the newest."""
        for number in range(self.num_backups, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                _copy_of(path, number - 1).replace(_copy_of(path, number))
        return _copy_of(path, 1)


UNBOUNDED = LogBounds()


def _copy_of(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


class ReopenedFile(logging.FileHandler):
    """A log file that is renamed when it is full, and can be reopened under its name."""

    def __init__(self, path: Path, *, bounds: LogBounds = UNBOUNDED) -> None:
        super().__init__(path)
        self._path = path
        self._bounds = bounds

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line, into a new file if this one is full."""
        try:
            self._rotate_if_full()
        except OSError:  # the line still goes into the file that is open
            self.handleError(record)
        super().emit(record)

    def _rotate_if_full(self) -> None:
        if self.stream is None or not self._bounds.max_bytes:
            return
        ours = os.fstat(self.stream.fileno())
        if not self._bounds.is_full(ours.st_size):
            return
        # Another process of this name may already have renamed it, e.g. the daemon that this one replaces.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(ours, self._path.stat()):
                self._path.replace(self._bounds.make_room(self._path))
        self.reopen()

    def reopen(self) -> None:
        """Closes the file and opens the one that has its name now. Do not call it in a signal handler."""
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
    """Logs JSON lines to `<run>/logs/<name>.log`, and plain warnings to stderr (on a terminal, INFO too).

    Raises ArealError if the file cannot be opened.
    """
    paths = RunPaths.of(config)
    bounds = LogBounds.of(config.daemon)
    try:
        paths.logs.mkdir(parents=True, exist_ok=True)
        file = log_file(paths.logs / f"{name}.log", bounds=bounds)
    except OSError as error:
        raise ArealError(
            f"no log: {error}; make runs_dir={config.runs_dir} writable, or change it"
        ) from error
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(PlainFormatter(name))
    plain.addFilter(lambda record: record.name != exit_log.name)
    plain.addFilter(RateLimit())
    plain.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    configure_handlers(file, plain, level=config.daemon.log_level)
    if output := os.environ.get(OUTPUT_FILE):
        Outputs.bound(Path(output), bounds)


def configure_launcher_log(paths: RunPaths, daemon: DaemonConfig) -> None:
    """Logs JSON lines of a launcher to `<run>/logs/launcher.log`, and nothing to its terminal."""
    file = log_file(paths.logs / "launcher.log", bounds=LogBounds.of(daemon))
    configure_handlers(file, level=daemon.log_level)


def log_file(path: Path, *, bounds: LogBounds = UNBOUNDED) -> ReopenedFile:
    """A handler that writes JSON lines to a file."""
    file = ReopenedFile(path, bounds=bounds)
    file.setFormatter(JsonFormatter())
    file.addFilter(RateLimit())
    return file


_own_level = ""
"""The level that this process is configured with; empty before `configure_handlers`."""


def configure_handlers(*handlers: logging.Handler, level: str) -> None:
    """Installs these handlers as those of the process."""
    global _own_level
    _own_level = level
    logging.basicConfig(level=level, handlers=handlers, force=True)


def follow_level(level: str) -> None:
    """Logs from this level on, which an operator has set for all daemons; empty: from the process's own level
    on."""
    wanted, root = level or _own_level, logging.getLogger()
    if not wanted or root.level == (number := logging.getLevelNamesMapping()[wanted]):
        return
    root.setLevel(min(number, root.level))
    log.info("the log level is now %s", wanted)
    root.setLevel(number)


OUTPUT_FILE = "AREAL_LIKE_OUTPUT_FILE"
"""Environment variable with the file that a process's stdout and stderr go to, if its parent opened one."""


class Outputs:
    """The files of plain output that this process keeps below a limit: its own and its children's.

    The thread of `handle_log_signals` calls `shorten` about every CHECK_S seconds. Every writer of such a
    file must have opened it for appending.
    """

    CHECK_S: ClassVar[float] = 1.0
    _files: ClassVar[dict[Path, LogBounds]] = {}

    @classmethod
    def bound(cls, path: Path, bounds: LogBounds) -> None:
        """Keeps the file below its limit from now on."""
        if bounds.max_bytes:
            cls._files[path] = bounds

    @classmethod
    def shorten(cls) -> None:
        """Copies and truncates the files that are full. Raises OSError at the end if one cannot be copied."""
        first: OSError | None = None
        for path, bounds in list(cls._files.items()):
            try:
                copy_and_empty(path, bounds)
            except OSError as error:
                first = first or error
        if first is not None:
            raise first


def copy_and_empty(path: Path, bounds: LogBounds) -> None:
    """Copies a full file and truncates it; what is written to it meanwhile may be lost.

    Several processes may call it for one file (the ranks of a trainer); only one of them does the work.
    Raises OSError if the copy cannot be written; the file is truncated anyway, because the run needs
    the space on a full disk.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        if not bounds.is_full(os.fstat(file.fileno()).st_size) or not _is_locked(file):
            return
        if not bounds.is_full(os.fstat(file.fileno()).st_size):
            return  # another process was faster
        copy = bounds.make_room(path)
        try:
            shutil.copyfile(path, copy)
        except OSError:
            copy.unlink(missing_ok=True)
            raise
        finally:
            file.truncate(0)


def _is_locked(file: BinaryIO) -> bool:
    """Locks the file; False if another process holds it. True also where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


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
