"""`areal-like status RUN`: shows the state of a run's daemons and the numbers of tickets by state."""

from __future__ import annotations

import argparse

from rich.console import Console

from launch.commands.running_job import add_job, job_of
from launch.observation.observer import Observation
from launch.view.daemons import daemon_table, tickets_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job."""
    add_job(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 when no daemon runs.

    Raises ConfigError without such a run, or without the operator's token of a run with keys.
    """
    job = job_of(args)
    daemons = job.daemons()
    console = Console()
    if not daemons:
        console.print(f"{job.name}: no daemon is running", markup=False, highlight=False)
        return 1
    console.print(daemon_table(list(daemons.values()), width=console.width))
    seen = Observation(daemons=daemons)
    if seen.buffer:
        console.print(tickets_line(seen))
    for daemon in daemons.values():
        if url := daemon.endpoint.get("sessions"):
            console.print(f"{daemon.name}: sessions for agents at {url}", markup=False, highlight=False)
    return 0
