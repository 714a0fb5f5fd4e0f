"""The options of a run's last submission, which a later one keeps unless it gives others."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, write_json
from launch.nodes.start import ROLES
from launch.slurm.script import scripts_of

DEFAULTS: dict[str, Any] = {
    "rollout_jobs": None,
    "trainer_nodes": 1,
    "partition": "",
    "time": "",
    "interface": "",
    "max_failures": 5,
    "sbatch_args": "",
    **{f"{role}_args": "" for role in ROLES},
}
"""Name in the parsed command line -> value without the option. The parser's own defaults are None."""

_NUMBERS = {"rollout_jobs": (int, type(None)), "trainer_nodes": (int,), "max_failures": (int,)}
_REMEDY = "remove the file and give the options again"


def complete(args: argparse.Namespace, kept: dict[str, Any]) -> str:
    """Fills in the options that were not given; returns those that are kept, as they are typed."""
    texts = []
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            value = kept.get(name, default)
            setattr(args, name, value)
            if value != default:
                # With "=": the value may begin with a dash.
                texts.append(f"--{name.replace('_', '-')}={shlex.quote(str(value))}")
    return " ".join(texts)


def keep(paths: RunPaths, args: argparse.Namespace) -> None:
    """Writes the options of this submission into the run's directory."""
    write_json(_file(paths), {name: getattr(args, name) for name in DEFAULTS})


def read_kept(paths: RunPaths) -> dict[str, Any]:
    """The options of the last submission; empty if there was none. Raises ConfigError."""
    try:
        kept = json.loads(_file(paths).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_file(paths)} cannot be read ({error}): {_REMEDY}") from None
    for name, value in kept.items() if isinstance(kept, dict) else [("", kept)]:
        types = _NUMBERS.get(name, (str,))
        if name not in DEFAULTS or type(value) not in types:
            raise ConfigError(f"{_file(paths)}: {name}={value!r} is no option of a submission: {_REMEDY}")
    return dict(kept)


def _file(paths: RunPaths) -> Path:
    return scripts_of(paths) / "options.json"
