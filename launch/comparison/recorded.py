"""Reads the records in a run's directory, for a comparison with another run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_like.config.loading import flat
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, find_checkpoints
from launch.run_files import read_config, read_rows
from trainer.replay.recording import Recording

ROUNDING_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""`model.dtype` -> largest relative difference that a different order of summation makes."""


class RecordedRun:
    """One run: settings, trajectories by step, rows of metrics.jsonl, checkpoints.

    The trajectories of a replay are those of the run that it trained again.
    """

    def __init__(self, root: Path) -> None:
        """Raises ConfigError if the directory has no readable configuration."""
        self.root = root
        self.paths = RunPaths(root.resolve())
        self.settings = flat(read_config(self.paths.config))
        self.checkpoints = find_checkpoints(self.paths.checkpoints)
        self.source, self.has_own_lr = _recording_of(self.paths)
        """The directory whose ledger has the trajectories."""
        self.missing = ""
        """Why trajectories are missing or incomplete."""
        self.recording = self._open()
        self.num_groups = {} if self.recording is None else self.recording.num_groups()
        self.steps_of_versions = {} if self.recording is None else self.recording.steps_of_versions()

    @property
    def has_records(self) -> bool:
        """True if every trajectory that was trained on is kept."""
        return self.recording is not None and not self.recording.num_gone

    @property
    def rounding_tolerance(self) -> float:
        """The relative difference that a different order of summation may make."""
        return ROUNDING_TOLERANCE.get(self.settings.get("model.dtype", ""), ROUNDING_TOLERANCE["float32"])

    @property
    def initial_weights(self) -> Path | None:
        """The directory of the weights before step 0; None for a name on the hub."""
        if self.paths.built_model.is_dir():
            return self.paths.built_model
        named = Path(self.settings.get("model.path", "")).expanduser()
        return named.resolve() if (named / "config.json").is_file() else None

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, its row of metrics.jsonl; without one, an empty row for each step of the ledger)."""
        num = 0
        for row in read_rows(self.paths.metrics):
            if row is None:  # cut short by a crash
                break
            if not isinstance(row.get("step"), int):
                raise ConfigError(f"{self.paths.metrics}: line {num + 1} is not the row of a step")
            num += 1
            yield row["step"], row
        if not num:
            yield from ((step, {}) for step in sorted(self.num_groups))

    def close(self) -> None:
        """Closes the ledgers."""
        if self.recording is not None:
            self.recording.close()

    def _open(self) -> Recording | None:
        if self.source is None:
            self.missing = f"{self.root}: the run that it replays no longer exists"
            return None
        try:
            if not RunPaths(self.source).ledgers:
                self.missing = f"{self.root}: its trajectories (it has no ledger)"
                return None
            recording = Recording(self.source, needs_records=False)
        except (ConfigError, sqlite3.DatabaseError) as error:
            self.missing = f"{self.root}: its trajectories ({error})"
            return None
        if recording.num_gone:
            self.missing = (
                f"{self.root}: tokens and log-probs of its trajectories "
                "(only a run with buffer.retain_trajectories=true keeps them)"
            )
        return recording


def _recording_of(paths: RunPaths) -> tuple[Path | None, bool]:
    """(directory with the run's ledger, whether it is a replay with its own learning rate)."""
    if not paths.replay.exists():
        return paths.root, False
    try:
        replay = json.loads(paths.replay.read_text())
        named, own_lr = Path(replay["recording"]), bool(replay["own_lr"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{paths.replay} cannot be read ({error!r})") from None
    there = next((path for path in (named, paths.root.parent / named.name) if path.is_dir()), None)
    return there, own_lr
