"""Ctrl-C and SIGTERM for commands that run a job in the foreground."""

from __future__ import annotations

import signal
import time
from types import FrameType


class StopSignals:
    """Counts Ctrl-C, SIGTERM and SIGHUP.

    Signals within a second of the last counted one are ignored: terminals and process supervisors often
    deliver a signal twice.
    """

    def __init__(self) -> None:
        self.count = 0
        self._last_s = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.count == 0 or now_s - self._last_s > 1.0:
            self.count += 1
            self._last_s = now_s
