"""Incremental reading of a run's metrics.jsonl."""

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
        """The progress over all rows so far, in the order of the file, which is that of the steps."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a resumed trainer writes the file anew
                    self._inode, self._offset, self._tally = inode, 0, StepTally()
                file.seek(self._offset)
                # Line by line and not in one read: the file of a resumed run may be large.
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
