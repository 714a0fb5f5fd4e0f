"""`areal-like reap RUN`: removes the sandboxes that a stopped run has left behind."""

from __future__ import annotations

import argparse

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.parser import RUN, command
from launch.run_directory.rundir import find_run, is_held


@command(
    "reap",
    "Remove the sandboxes that a stopped run has left behind: containers, remote sandboxes, directories. The "
    "next start of the same run does so by itself; bwrap leaves nothing.",
    RUN,
    examples=["reap myrun"],
)
def main(args: argparse.Namespace) -> int:
    """Prints how many were removed. Raises ConfigError while the run has processes on this machine."""
    paths = RunPaths(find_run(args.run).resolve())
    if is_held(paths):
        raise ConfigError(f"reap {args.run}: the run is running, and its sandboxes are in use: stop it first")
    config = load_config(["--config", str(paths.config)])
    from rollout_server.sandbox.reaping import reap_run

    print(f"{reap_run(config, paths)} sandboxes removed ({config.rewards.sandbox})")
    return 0
