"""Logging of one process: JSON lines in the run's `logs/` directory, short plain lines on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time

from areal_like.config import Config
from areal_like.paths import RunPaths

exit_log = logging.getLogger("areal_like.runtime.exit")
"""Logger of the reason why a process ends. It does not write to stderr: `exit_code_of` writes that line
itself, without time and level."""


class JsonFormatter(logging.Formatter):
    """Formats each log entry as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Keys: time (Unix seconds), level, logger, message; `exception` (the traceback) if there is one."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class PlainFormatter(logging.Formatter):
    """Formats each log entry as one short line; the traceback is only in the log file."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        """Time of day, daemon, level, message."""
        time_of_day = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{time_of_day} {self._name} {record.levelname} {record.getMessage()}"


def configure_logging(config: Config, name: str) -> None:
    """Logs JSON lines to `<run>/logs/<name>.log`, and plain warnings to stderr (on a terminal, INFO too)."""
    paths = RunPaths.of(config)
    paths.logs.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(paths.logs / f"{name}.log")
    file.setFormatter(JsonFormatter())
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(PlainFormatter(name))
    plain.addFilter(lambda record: record.name != exit_log.name)
    plain.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    logging.basicConfig(level=config.daemon.log_level, handlers=[file, plain], force=True)
