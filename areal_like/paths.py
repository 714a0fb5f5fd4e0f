"""Paths of a run's files. No other module contains their names."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.shards import WHOLE, Shard

BUILT_MODELS = ("tiny", "smollm2")
"""Values of `model.path` that are prepared into the run's directory."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files in the directory of an adapter; there is no config.json."""
_LEDGER_NAME = re.compile(r"ledger(-\d+)?")
_CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")


class _Below:
    """A file or directory below a run's directory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunPaths, owner: type[RunPaths]) -> Path:
        return run.root / self._name


@dataclass(frozen=True)
class RunPaths:
    """Files of one run."""

    root: Path

    config = _Below("config.yaml")
    """The resolved configuration."""
    next_config = _Below("config.next.yaml")
    """The configuration that the processes of a resumed run read; it becomes `config` once all daemons have
    been ready."""
    config_changes = _Below("config_changes.jsonl")
    """The changes of `config` and their times, one JSON object for each change."""
    logs = _Below("logs")
    """Directory with one `<daemon>.log` for each daemon."""
    endpoints = _Below("endpoints")
    """Directory with one `<daemon>.json` for each running daemon: its pid and addresses."""
    checkpoints = _Below("checkpoints")
    """Directory of the checkpoints, `step_000100/` and so on."""
    built_model = _Below("model")
    """Directory of the initial policy if `model.path` is one of BUILT_MODELS."""
    traces = _Below("traces")
    """Directory with the last collectives of failed ranks, one file for each rank."""
    spans = _Below("spans")
    """Directory of the daemons' spans, for `areal-like trace`."""
    adapters = _Below("adapters")
    """Folders of the LoRA adapters that a server's SGLang has loaded, for each server."""
    profiles = _Below("profiles")
    """Directory of recorded steps: traces and reports of `areal-like profile`."""
    metrics = _Below("metrics.jsonl")
    """One JSON object for each optimizer step."""
    tensorboard = _Below("tensorboard")
    """Event files of the tracker `tensorboard`."""
    wandb = _Below("wandb")
    """Files of the tracker `wandb`, whose name for this directory is fixed."""
    evaluations = _Below("evaluations.jsonl")
    """One JSON object for each evaluation of each set."""
    rows = _Below("rows.json")
    """Facts about a supervised run, one JSON object: its steps, and how its rows were used."""
    replay = _Below("replay.json")
    """The run that a replay trained again, one JSON object."""
    sandbox_owner = _Below("sandbox_owner")
    """The id by which sandboxes are known to be this run's, one word."""
    summary = _Below("summary.json")
    """Summary of the run, one JSON object written at its end."""

    @classmethod
    def of(cls, config: Config) -> RunPaths:
        """The run directory of a configuration, as an absolute path. Raises ConfigError for `~user` without
        such a user."""
        try:
            runs_dir = Path(config.runs_dir).expanduser()
        except RuntimeError:
            raise ConfigError(f"runs_dir={config.runs_dir}: this machine has no such user") from None
        return cls(runs_dir.resolve() / config.name)

    @property
    def named(self) -> list[Path]:
        """All of the above, whether they exist or not."""
        return [getattr(self, name) for name, value in vars(RunPaths).items() if isinstance(value, _Below)]

    @property
    def ledger(self) -> Path:
        """The buffer's durable state: `ledger.sqlite3` and `segments/`."""
        return self.ledger_of(WHOLE)

    def ledger_of(self, shard: Shard) -> Path:
        return self.root / shard.ledger

    @property
    def ledgers(self) -> list[Path]:
        """The ledger directories that exist, in the order of their shards.

        Raises ConfigError if one is on a disk that this machine does not have (`buffer.ledger_dir`).
        """
        for path in self.ledger_places:
            if path.is_symlink() and not path.is_dir():
                raise ConfigError(
                    f"{path} is a link to {path.readlink()}, which this machine does not have: "
                    "run the command where the buffer runs"
                )
        return [path for path in self.ledger_places if (path / "ledger.sqlite3").exists()]

    @property
    def ledger_places(self) -> list[Path]:
        """The ledger directories and links to them, empty and broken ones included, in the order of their
        shards.

        A ledger that was moved away within the run's directory (`ledger.old`) is left out.
        """
        found = [path for path in self.root.glob("ledger*") if _LEDGER_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (len(path.name), path.name))


def model_path(config: Config) -> str:
    """The argument for `from_pretrained`: a directory or a hub name.

    Raises ConfigError for an absent directory.
    """
    if config.model.path in BUILT_MODELS:
        built = RunPaths.of(config).built_model
        if not (built / "config.json").exists():
            raise ConfigError(
                f"{built} contains no model: "
                "run `python -m trainer.prepare_model` with this configuration first"
            )
        return str(built)
    folder = Path(config.model.path).expanduser()
    # A hub name has one slash: a misspelled directory must not become a request to the hub.
    looks_local = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
    looks_local = looks_local or folder.is_dir()
    if looks_local and (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"model.path={config.model.path} is an adapter: set model.lora.path to it and model.path to its "
            f"base, or merge the two first: areal-like merge {config.model.path} --into DIRECTORY"
        )
    if looks_local and not (folder / "config.json").exists():
        found = find_checkpoints(RunPaths(folder).checkpoints)
        hint = f"; this run's newest checkpoint is {found[max(found)]}" if found else ""
        raise ConfigError(f"model.path={config.model.path}: no config.json there{hint}")
    return str(folder) if looks_local else config.model.path


def checkpoint_name(step: int) -> str:
    """Name of the directory of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def find_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Step -> directory of every complete checkpoint in `RunPaths.checkpoints`, ascending.

    Empty for a directory that does not exist or cannot be read. A checkpoint gets its final name by a rename
    when it is complete, so checking the name is enough.
    """
    try:
        names = [(_CHECKPOINT_NAME.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def cache_dir() -> Path:
    """Directory for files that all runs share: `areal_like` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "areal_like"


def smollm2_file() -> Path:
    """File in which `areal-like fetch smollm2` stores the weights of `model.path=smollm2`."""
    return cache_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"


def read_json(path: Path) -> Any:
    """The content of a JSON file that another process wrote. Raises OSError, and ValueError if it is not
    JSON."""
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_endpoint(path: Path) -> dict[str, Any] | None:
    """The content of an endpoint file, or None if the daemon has not written it, or it is damaged."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, and its directory; readers see the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write a file at; the file replaces `path` at the end of the block, unless it raises.

    So readers never see a partial file.
    """
    # Random, because processes of several containers that share a directory can have the same process id.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def require_private(path: Path) -> None:
    """Raises ConfigError if other users can read the file, OSError if it is not there."""
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by other users: chmod 600 {path}")


def private_descriptor(path: Path) -> int:
    """The descriptor of a new, empty file that only its owner can read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
