"""For runs of offline training: a stop after some steps, and what such a run has written."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from areal_like.paths import RunPaths
from tests.support.trainer_helpers import without_measured


class StopAfter(threading.Event):
    """Is set after a number of steps: it is asked once before each."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_left = num_steps

    def is_set(self) -> bool:
        self.num_left -= 1
        return self.num_left < 0


def metrics_of(paths: RunPaths) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what is measured."""
    rows = map(json.loads, paths.metrics.read_text().splitlines())
    return [without_measured(row) for row in rows]


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
