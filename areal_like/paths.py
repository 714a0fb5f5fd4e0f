"""Where a run keeps its files; the only place that spells their names."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.shards import WHOLE, Shard

BUILT_MODELS = ("tiny", "smollm2")
"""Values of `model.path` that are prepared into the run's directory."""

_CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class RunPaths:
    """Files of one run."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> RunPaths:
        """The run directory that a configuration names (absolute)."""
        return cls(Path(config.runs_dir).expanduser().resolve() / config.name)

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.root / "config.yaml"

    @property
    def logs(self) -> Path:
        """One `<daemon>.log` each."""
        return self.root / "logs"

    @property
    def endpoints(self) -> Path:
        """One `<daemon>.json` each: pid and addresses of a running daemon."""
        return self.root / "endpoints"

    @property
    def checkpoints(self) -> Path:
        """`step_000100/` and so on."""
        return self.root / "checkpoints"

    @property
    def ledger(self) -> Path:
        """What the buffer must not forget: `ledger.sqlite3` and `segments/`."""
        return self.ledger_of(WHOLE)

    def ledger_of(self, shard: Shard) -> Path:
        """The same of one of several buffers."""
        return self.root / shard.ledger

    @property
    def ledgers(self) -> list[Path]:
        """Those that are there, in the order of their shards."""
        found = [path.parent for path in self.root.glob("ledger*/ledger.sqlite3")]
        return sorted(found, key=lambda path: (len(path.name), path.name))

    @property
    def built_model(self) -> Path:
        """Initial policy when `model.path` is one that we build."""
        return self.root / "model"

    @property
    def metrics(self) -> Path:
        """One JSON object an optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The run in one JSON object, written at its end."""
        return self.root / "summary.json"


def model_path(config: Config) -> str:
    """What `from_pretrained` is given: a directory, or a hub name. Raises ConfigError for a directory that is not there."""
    if config.model.path in BUILT_MODELS:
        built = RunPaths.of(config).built_model
        if not (built / "config.json").exists():
            raise ConfigError(
                f"{built} does not hold a model: run `python -m trainer.prepare_model` with this configuration first"
            )
        return str(built)
    looks_local = config.model.path.startswith((".", "/", "~"))
    if looks_local and not (Path(config.model.path).expanduser() / "config.json").exists():
        raise ConfigError(f"model.path={config.model.path}: no config.json there")
    return str(Path(config.model.path).expanduser()) if looks_local else config.model.path


def checkpoint_name(step: int) -> str:
    """Name of the directory of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def find_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Step -> directory of every complete checkpoint in `RunPaths.checkpoints`, ascending.

    A checkpoint appears by a rename when it is complete, so its name is all that has to be checked.
    """
    if not checkpoints.is_dir():
        return {}
    names = ((_CHECKPOINT_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def cache_dir() -> Path:
    """Directory for files that all runs share: `areal_like` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "areal_like"


def smollm2_file() -> Path:
    """Where `areal-like fetch smollm2` puts the weights of `model.path=smollm2`."""
    return cache_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_json(path: Path, value: Any) -> None:
    """Writes a whole file or none: readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
