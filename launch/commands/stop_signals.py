"""Ctrl-C and SIGTERM for commands that run a job in the foreground."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType


class StopSignals:
    """Counts Ctrl-C, SIGTERM, and SIGHUP when the terminal is gone.

    Signals within a second of the last counted one are ignored: terminals and process supervisors often
    deliver a signal twice. Any other SIGHUP calls `on_hangup`.
    """

    def __init__(self, *, on_hangup: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._last_s = 0.0
        self._on_hangup = on_hangup
        self._has_terminal = _has_terminal()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGHUP, self._handle_hangup)

    def _handle_hangup(self, number: int, frame: FrameType | None) -> None:
        if self._has_terminal and not _has_terminal():
            self._handle(number, frame)
        else:
            self._on_hangup()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.count == 0 or now_s - self._last_s > 1.0:
            self.count += 1
            self._last_s = now_s


def _has_terminal() -> bool:
    """True while one of the standard streams is a terminal that has not been closed."""
    return any(os.isatty(stream) for stream in (0, 1, 2))
