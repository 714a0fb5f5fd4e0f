"""`areal-like restart RUN trainer`: replaces the trainer of a running job, while its servers generate.

The launcher owns the trainer process, so this command writes an order into the run's directory and waits
until the launcher has taken it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config
from launch.commands.parser import add_run, add_settings
from launch.run_directory.rundir import find_run, is_over, restart_order_file

_TICK_S = 0.2
_TAKE_TIMEOUT_S = 10.0
_SHARED_SETTINGS = ("trainer.groups_per_step", "trainer.num_steps")
"""Settings of the trainer that the buffer uses too, so they cannot change while it runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, the role, and its settings."""
    add_run(parser)
    parser.add_argument("role", metavar="trainer", help="the only role that can be restarted alone")
    add_settings(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 0 when the launcher has taken the order."""
    return restart(args.run, args.role, args.settings)


def restart(run: str, role: str, settings: Sequence[str]) -> int:
    """Orders the launcher to replace a job's trainer; returns 0 when the launcher has taken the order.

    Raises ConfigError for another role, for a setting that other roles use too, and if no launcher runs.
    """
    if "=" in role:
        raise ConfigError(
            "restart: put `trainer` before the settings: areal-like restart RUN trainer trainer.KEY=VALUE"
        )
    paths = RunPaths(find_run(run))
    if role != "trainer":
        raise ConfigError(
            f"restart: only `trainer` can be restarted alone, not {role!r}; to replace a server, use "
            "`drain` and `rollout --join`"
        )
    if any(not setting.startswith("trainer.") for setting in settings):
        raise ConfigError("restart: only trainer.* settings may change while the other roles keep theirs")
    if shared := [setting for setting in settings if setting.partition("=")[0] in _SHARED_SETTINGS]:
        raise ConfigError(
            f"restart: the buffer uses {shared[0].partition('=')[0]} too: "
            f"stop the run and continue it with resume=latest {shared[0]}"
        )
    load_config(["--config", str(paths.config), *settings])
    if is_over(paths):
        raise ConfigError(
            f"restart: no launcher runs {paths.root}; start the trainer yourself with resume=latest"
        )
    order = restart_order_file(paths)
    write_json(order, {"role": role, "settings": list(settings)})
    deadline_s = time.monotonic() + _TAKE_TIMEOUT_S
    while order.exists():
        if time.monotonic() > deadline_s:
            order.unlink(missing_ok=True)
            raise ConfigError(
                f"restart: the launcher of {paths.root.name} does not take the order; "
                "is it closing, or still starting?"
            )
        time.sleep(_TICK_S)
    sys.stdout.write("the trainer finishes its step, writes a checkpoint, and is started again\n")
    return 0
