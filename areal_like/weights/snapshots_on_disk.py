"""Weights on disk that an engine may start from: the run's checkpoints, as far as they say which version they are.

The trainer has a version given out for each checkpoint, so a server that joins late, or lost its engine, can serve at once what the
staleness bound still allows, under a version that the ledger knows, and need not be sent anything to be of use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from areal_like.paths import find_checkpoints

STATE_FILE = "trainer_state.json"
VERSION_KEY = "weights_version"
"""In the state file's `extra`."""


@dataclass(frozen=True, kw_only=True)
class DiskSnapshot:
    """A Hugging Face directory and the version that its weights have."""

    path: Path
    version: int


def newest_snapshot(checkpoints: Path) -> DiskSnapshot | None:
    """The checkpoint of the latest step; None when there is none to be seen from here, or it names no version."""
    steps = find_checkpoints(checkpoints)
    if not steps:
        return None
    path = steps[max(steps)]
    try:
        version = json.loads((path / STATE_FILE).read_text())["extra"][VERSION_KEY]
    except (OSError, ValueError, KeyError):
        return None  # pruned while we looked, or written before checkpoints had versions
    return DiskSnapshot(path=path, version=int(version))
