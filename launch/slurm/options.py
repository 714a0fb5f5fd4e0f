"""The options of a run's jobs on Slurm: a later submission keeps those that it does not give."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from areal_like.config.loading import build
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, write_json
from launch.nodes.settings import ClusterOptions

_REMEDY = "remove the file and give the options again"


@dataclass(frozen=True, kw_only=True)
class SlurmOptions(ClusterOptions):
    """A user's choices for the jobs of a run."""

    partition: str = ""
    """Partition of the jobs; by default the cluster's."""
    time: str = ""
    """Time limit of each job, as sbatch takes it; by default the partition's."""
    sbatch_args: str = ""
    """Options of sbatch for all jobs, in one quoted word."""
    buffer_args: str = ""
    """Options of sbatch for the buffer's job."""
    trainer_args: str = ""
    """Options of sbatch for the trainer's job."""
    rollout_args: str = ""
    """Options of sbatch for the rollout jobs."""
    scorer_args: str = ""
    """Options of sbatch for the jobs of score servers."""
    router_args: str = ""
    """Options of sbatch for the routers' jobs."""

    def words_of(self, role: str) -> list[str]:
        """The options of sbatch for the jobs of a role, each in the form of an #SBATCH line.

        Raises ConfigError.
        """
        return [*self._words("sbatch_args"), *self._words(f"{role}_args")]

    def _words(self, name: str) -> list[str]:
        text, option = getattr(self, name), f"--{name.replace('_', '-')}"
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"{option}={text}: {error}") from None
        wrong = next((word for word in words if not word.startswith("-") or "\n" in word or '"' in word), "")
        if wrong:
            raise ConfigError(f"{option}: {wrong!r} is not an option of the form --name=value")
        return words

    def keep(self, paths: RunPaths) -> None:
        """Writes the options of this submission into the run's directory."""
        write_json(_file(paths), asdict(self))


def scripts_of(paths: RunPaths) -> Path:
    """Directory of the run's batch scripts and options."""
    return paths.root / "slurm"


def read_kept(paths: RunPaths) -> dict[str, Any]:
    """The options of the last submission; empty if there was none. Raises ConfigError."""
    file = _file(paths)
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text())
        build(SlurmOptions, kept)  # checks names, types and ranges
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): {_REMEDY}") from None
    return dict(kept)


def kept_text(args: argparse.Namespace, kept: Mapping[str, Any]) -> str:
    """The kept options that the command line does not give, as they are typed."""
    defaults = asdict(SlurmOptions())
    names = [field.name for field in fields(SlurmOptions) if getattr(args, field.name) is None]
    return " ".join(
        f"--{name.replace('_', '-')}={shlex.quote(str(kept[name]))}"  # with "=": it may begin with a dash
        for name in names
        if name in kept and kept[name] != defaults[name]
    )


def _file(paths: RunPaths) -> Path:
    return scripts_of(paths) / "options.json"
