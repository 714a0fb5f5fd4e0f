"""Reads a run's metrics.jsonl incrementally."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from launch.observation.progress import Progress, StepTally


class MetricsTail:
    """Reads the rows appended to metrics.jsonl since the last call of `read`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._tally = StepTally()

    def read(self) -> Progress:
        """Reads the new rows; returns the progress over all rows so far, which are in order of steps."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a resumed trainer has replaced the file
                    self._inode, self._offset, self._tally = inode, 0, StepTally()
                file.seek(self._offset)
                # Line by line, because the file of a resumed run may be too large for one read.
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._add(line)
        except FileNotFoundError:
            return Progress()
        return self._tally.progress

    def _add(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            int(row["step"])
            self._tally.add(row)
