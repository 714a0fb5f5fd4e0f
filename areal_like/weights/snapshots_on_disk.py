"""Finds the newest checkpoint of the run from which an engine may load its weights.

The trainer allocates a weight version for each checkpoint and writes it to the checkpoint's state file. So a
server that joins late, or whose engine was restarted, can load a checkpoint and generate at once under a
version that the ledger accepts (if the staleness bound allows it), without waiting for a push.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from areal_like.paths import find_checkpoints, read_json

STATE_FILE = "trainer_state.json"
FORMAT = 2
"""Format of a checkpoint, in its state file."""
OLD_FORMAT = 1
"""Format of the release before: whole tensors in one file for the weights and one for the moments."""
ADAPTER_STATE = "adapter"
"""Key of the `AdapterHeader` of a checkpoint that has only an adapter."""
VERSION_KEY = "weights_version"
"""Key of the version in the state file's `extra`."""


@dataclass(frozen=True, kw_only=True)
class DiskSnapshot:
    """A Hugging Face directory and the version of its weights."""

    path: Path
    version: int


def newest_snapshot(checkpoints: Path) -> DiskSnapshot | None:
    """The checkpoint of the latest step.

    None if this machine has no access to a checkpoint, or if the latest one contains no version or only an
    adapter: the engine then starts with the base and waits for a push.
    """
    try:
        steps = find_checkpoints(checkpoints)
        if not steps:
            return None
        path = steps[max(steps)]
        state = read_json(path / STATE_FILE)
        if ADAPTER_STATE in state:
            return None
        version = state["extra"][VERSION_KEY]
    except (OSError, ValueError, KeyError):
        return None  # unreadable, meanwhile deleted, or written before checkpoints contained versions
    return DiskSnapshot(path=path, version=int(version))
