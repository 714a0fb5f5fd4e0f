"""The batch scripts of a run: #SBATCH lines, variables, and the common part `launch/deploy/slurm/job.sh`.

There is one script for each role, in `<run>/slurm/`.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from launch.local_job.child import python_path
from launch.nodes.settings import counts_of, gpus_of
from launch.slurm.options import SlurmOptions

BODY = Path(__file__).resolve().parents[1] / "deploy" / "slurm" / "job.sh"
_EARLY_S = 600
"""After a start that lasted this long, earlier failures of a job no longer count."""
_PLAIN = re.compile(r"[\w.,:;@%+=/\[\]~-]+", re.ASCII)
"""An option that sbatch parses without quotes."""
_MARGIN_S = 30
"""Seconds between the end of the longest drain and the time limit."""


def job_name(config: Config, role: str) -> str:
    """The name of the run's jobs of one role."""
    return f"areal-{config.name}-{role}"


def job_scripts(config: Config, options: SlurmOptions) -> dict[str, str]:
    """The batch script of each role, with this interpreter and directory. Raises like `job_script`."""
    return {
        role: job_script(
            config, role, options, python=sys.executable, python_path=python_path(), directory=Path.cwd()
        )
        for role in counts_of(config, num_servers=1)
    }


def job_script(
    config: Config, role: str, options: SlurmOptions, *, python: str, python_path: str, directory: Path
) -> str:
    """The batch script of one role. `directory`: base of relative paths in the configuration.

    Raises ConfigError for a wrong option of sbatch, and for control characters in an option or a path.
    """
    paths = RunPaths.of(config)
    gpus = gpus_of(config, role, trainer_nodes=options.trainer_nodes)
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
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *options.words_of(role),
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


def _check_printable(lines: Iterable[str]) -> None:
    """Raises ConfigError for a line that is more than one in a script: the second would be a command."""
    for line in lines:
        if not line.isprintable():
            raise ConfigError(f"submit: {line!r} has a character that is not printable: remove it")


def _quoted(option: str) -> str:
    """Quotes an option if necessary: sbatch splits unquoted text at blanks and ends it at `#`."""
    if _PLAIN.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
