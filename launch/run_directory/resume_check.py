"""Whether a run can continue with other settings: what its checkpoint and its ledger decide.

Everything here is checked before a process starts, because a daemon that refuses its settings may already
have written into the run's directory.
"""

from __future__ import annotations

from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.ledger_place import recorded_shards
from areal_like.paths import BUILT_MODELS, RunPaths


def check_resume(before: Config | None, after: Config, paths: RunPaths) -> None:
    """`before`: the run's own settings, None if they cannot be read; `after`: those of the resume.

    Raises ConfigError if the run cannot continue with them.
    """
    num_shards = recorded_shards(paths) or (before or after).buffer.num_shards
    if after.buffer.num_shards != num_shards:
        raise ConfigError(
            f"buffer.num_shards={after.buffer.num_shards}: the number of shards cannot change during a run: "
            f"continue with buffer.num_shards={num_shards}, or start a new run from a checkpoint "
            "(model.path=...)"
        )
    if before is not None and not _is_same_model(before.model.path, after.model.path):
        raise ConfigError(
            f"model.path={after.model.path}: the weights of a run come from its checkpoint, so its model "
            f"cannot change ({before.model.path}): leave model.path out, or start a new run from the other "
            "model with name=..."
        )


def _is_same_model(before: str, after: str) -> bool:
    old, new = Path(before).expanduser(), Path(after).expanduser()
    if old.is_absolute() and not old.exists():
        return True  # it was moved; the trainer compares the shapes of its model with the checkpoint's
    is_built = before in BUILT_MODELS or after in BUILT_MODELS
    return before == after or (not is_built and old.is_dir() and new.is_dir() and old.samefile(new))
