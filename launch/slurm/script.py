"""The batch scripts of a run: #SBATCH lines, variables, and the common part `launch/deploy/slurm/job.sh`.

There is one script for each role, in `<run>/slurm/`. A rollout job is one server, so the pool grows and
shrinks by jobs. Left out: job arrays, because a job of an array cannot be added later.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths

BODY = Path(__file__).resolve().parents[1] / "deploy" / "slurm" / "job.sh"
_EARLY_S = 600
"""A start that lasted longer is no failure in a row with the ones before."""
_PLAIN = re.compile(r"[\w.,:;@%+=/\[\]~-]+", re.ASCII)
"""An option that sbatch reads as it is."""
_MARGIN_S = 30
"""Between the end of the longest drain and the time limit."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses for the jobs of a run."""

    trainer_nodes: int = 1
    partition: str = ""
    time: str = ""
    """Time limit of each job, as Slurm writes it; empty: the partition's."""
    interface: str = ""
    """Network interface whose address the daemons bind; empty: the node's address in Slurm."""
    max_failures: int = 5
    """Failures in a row after which a job is not requeued."""
    arguments: tuple[str, ...] = ()
    """More options of sbatch, for all jobs."""
    role_arguments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """And for those of a role."""


def job_name(config: Config, role: str) -> str:
    """The name of the run's jobs of one role."""
    return f"areal-{config.name}-{role}"


def scripts_of(paths: RunPaths) -> Path:
    """Directory of the run's batch scripts."""
    return paths.root / "slurm"


def job_script(
    config: Config, role: str, options: Options, *, python: str, python_path: str, directory: Path
) -> str:
    """The batch script of one role. `directory`: where relative paths in the configuration begin.

    Raises ConfigError for control characters in an option or a path.
    """
    paths = RunPaths.of(config)
    sbatch = [
        f"--job-name={job_name(config, role)}",
        f"--comment={paths.root}",
        f"--output={paths.logs}/slurm-{role}-%j.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{math.ceil(config.daemon.drain_timeout_s) + _MARGIN_S}",
        f"--nodes={options.trainer_nodes if role == 'trainer' else 1}",
        "--ntasks-per-node=1",
        *([f"--partition={options.partition}"] if options.partition else []),
        *([f"--time={options.time}"] if options.time else []),
        *_gpus(config, role, options),
        *options.arguments,
        *options.role_arguments.get(role, ()),
    ]
    variables = {
        "ROLE": role,
        "RUN": str(paths.root),
        "PYTHON": python,
        "WORKDIR": str(directory),
        "MAX_FAILURES": str(options.max_failures),
        "EARLY_S": str(_EARLY_S),
    }
    exported = {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.interface:
        exported["AREAL_LIKE_INTERFACE"] = options.interface
    _check_printable([*sbatch, *(f"{name}={value}" for name, value in (variables | exported).items())])
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {_quoted(option)}" for option in sbatch),
            "umask 077",
            *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
            "",
            BODY.read_text(),
        ]
    )


def _gpus(config: Config, role: str, options: Options) -> list[str]:
    """The GPUs of one node, where the role is on GPUs."""
    if role == "trainer" and config.trainer.device != "cpu":
        return [f"--gpus-per-node={config.trainer.world_size // options.trainer_nodes}"]
    rollout = config.rollout
    if role == "rollout" and rollout.engine_device != "cpu" and not rollout.sglang.url:
        return [f"--gpus-per-node={rollout.gpus_per_engine}"]
    return []


def _check_printable(lines: Iterable[str]) -> None:
    """Raises ConfigError for a line that is more than one in a script: the second would be a command."""
    for line in lines:
        if not line.isprintable():
            raise ConfigError(f"submit: {line!r} has a character that is not printable: remove it")


def _quoted(option: str) -> str:
    """sbatch splits its lines at blanks and ends them at `#`, but for quoted values."""
    if _PLAIN.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
