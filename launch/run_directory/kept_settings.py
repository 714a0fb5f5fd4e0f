"""Keeps `config.yaml` of a run, and the history of its changes.

A resume or a restart may be given settings that a daemon refuses. Therefore `config.yaml` gets them only when
all daemons have been ready with them: until then the daemons of a resumed run read `config.next.yaml`, and a
later resume starts with settings that have worked. Each change is a line of `config_changes.jsonl`. Earlier
versions of the file are not kept: they follow from the changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from areal_like.config import Config, to_mapping
from areal_like.config.loading import flat
from areal_like.errors import ConfigError
from areal_like.ledger_place import recorded_shards
from areal_like.paths import BUILT_MODELS, RunPaths, replacing
from areal_like.runtime.command_line import load_config, save_config
from areal_like.security.redaction import without_secrets
from launch.run_directory.rundir import checkpoints
from launch.run_files import json_lines, unix_time

_MAX_CHANGES = 200
"""Most lines of the history; the oldest are dropped."""
_NOT_OF_THE_RUN = ("name", "resume", "runs_dir")
"""Settings that only say where the run is and how a launch started."""


@dataclass(frozen=True, kw_only=True)
class SettingsChange:
    """One change of `config.yaml`."""

    unix_s: float
    step: int
    """The first step with the new values: the step of the checkpoint from which the run continued."""
    by: str
    """`resume` | `restart` | `submit`."""
    changed: dict[str, tuple[str, str]]
    """Dotted key -> (old value, new value), as text without secrets; an empty text means that the key is
    absent."""

    @property
    def text(self) -> str:
        """The changes on one line."""
        return ", ".join(change_lines(self.changed))


def change_lines(changed: Mapping[str, tuple[str, str]]) -> list[str]:
    """`trainer.lr: 1e-05 -> 3e-05`, for each key."""
    return [f"{key}: {old or '(none)'} -> {new or '(none)'}" for key, (old, new) in changed.items()]


def changes(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """Dotted key -> (old value, new value) of the settings that differ; secrets are hidden."""
    old, new = to_mapping(before), to_mapping(after)
    plain, shown = (flat(old), flat(new)), (flat(without_secrets(old)), flat(without_secrets(new)))
    return {
        key: (shown[0].get(key, ""), shown[1].get(key, ""))
        for key in sorted(plain[0].keys() | plain[1].keys())
        if key not in _NOT_OF_THE_RUN and plain[0].get(key) != plain[1].get(key)
    }


def keep(config: Config, paths: RunPaths, *, by: str, step: int | None = None) -> None:
    """Makes these the settings of the run: writes `config.yaml`, and the changes into its history.

    `step`: the first with them; by default that of the newest checkpoint. Raises OSError.
    """
    before = stored(paths)
    changed = changes(before, config) if before is not None else {}
    if changed:
        step = max(checkpoints(paths), default=0) if step is None else step
        change = SettingsChange(unix_s=round(time.time(), 3), step=step, by=by, changed=changed)
        history = [*read_changes(paths), change][-_MAX_CHANGES:]
        with replacing(paths.config_changes) as partial:
            partial.write_text("".join(json.dumps(asdict(one)) + "\n" for one in history))
    save_config(config, paths.config)


def stored(paths: RunPaths) -> Config | None:
    """The run's `config.yaml`; None if there is none, or if this release cannot read it."""
    return _read(paths.config)


def left_out(paths: RunPaths) -> str:
    """The settings of the last resume that are not in `config.yaml`: its daemons were never ready."""
    if (after := _read(paths.next_config)) is None or (before := stored(paths)) is None:
        return ""
    return ", ".join(change_lines(changes(before, after)))


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
    if before is not None and _adapter(before) != _adapter(after):
        raise ConfigError(
            f"model.lora={_adapter(after)}: the adapter of a run cannot change ({_adapter(before)}): leave "
            "model.lora out, or start a new run with name=..."
        )


def _adapter(config: Config) -> str:
    """The settings of `model.lora` that a checkpoint belongs to."""
    lora = config.model.lora
    return f"rank {lora.rank}, alpha {lora.alpha:g}, targets {lora.targets}" if lora.is_on else "off"


def _is_same_model(before: str, after: str) -> bool:
    old, new = Path(before).expanduser(), Path(after).expanduser()
    if old.is_absolute() and not old.exists():
        return True  # it was moved; the trainer compares the shapes of its model with the checkpoint
    is_built = before in BUILT_MODELS or after in BUILT_MODELS
    return before == after or (not is_built and old.is_dir() and new.is_dir() and old.samefile(new))


def read_changes(paths: RunPaths) -> list[SettingsChange]:
    """The history, the oldest change first. Lines that cannot be read are left out."""
    found = []
    for row in json_lines(paths.config_changes):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            changed = {str(key): (str(old), str(new)) for key, (old, new) in dict(row["changed"]).items()}
            step = int(row["step"])
            if (unix_s := unix_time(row["unix_s"])) is None:
                raise ValueError
            found.append(SettingsChange(unix_s=unix_s, step=step, by=str(row["by"]), changed=changed))
    return found


def _read(path: os.PathLike[str]) -> Config | None:
    try:
        return load_config(["--config", os.fspath(path)])
    except ConfigError:
        return None
