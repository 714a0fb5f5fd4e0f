"""`areal-like status RUN`: shows the state of a run's daemons and the numbers of tickets by state."""

from __future__ import annotations

import argparse

from rich.console import Console

from launch.commands.parser import add_run
from launch.observation.http_json import operator_of
from launch.observation.observer import Observation, look_at_daemons
from launch.run_directory.rundir import find_run
from launch.view.daemons import daemon_table, tickets_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN."""
    add_run(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 when no daemon runs.

    Raises ConfigError without such a run, or without the operator's token of a run with keys.
    """
    root = find_run(args.run)
    daemons = look_at_daemons(root / "endpoints", operator=operator_of(root))
    console = Console()
    if not daemons:
        console.print(f"{root}: no daemon is running", markup=False, highlight=False)
        return 1
    console.print(daemon_table(list(daemons.values()), width=console.width))
    seen = Observation(daemons=daemons)
    if seen.buffer:
        console.print(tickets_line(seen))
    for daemon in daemons.values():
        if url := daemon.endpoint.get("sessions"):
            console.print(f"{daemon.name}: sessions for agents at {url}", markup=False, highlight=False)
    return 0
