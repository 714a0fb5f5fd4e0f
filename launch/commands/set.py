"""`areal-like set RUN max_staleness=N`: changes what may change while a job runs."""

from __future__ import annotations

import argparse
import sys

from areal_like.errors import ConfigError
from launch.commands.running_job import add_job, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job and the change."""
    add_job(parser)
    parser.add_argument("change", metavar="max_staleness=N", help="the new staleness bound")


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard has the change on disk. Raises ConfigError if it is refused."""
    key, _, value = args.change.partition("=")
    if key != "max_staleness" or not value.isdecimal():
        raise ConfigError(
            f"set {args.change}: only max_staleness=N can change while the run goes on; for other settings "
            "stop the run and resume it with them; for trainer.* `areal-like restart RUN trainer key=value`"
        )
    answers = job_of(args).post_all("set", {"max_staleness": int(value)})
    before = answers[0].get("before")
    sys.stdout.write(f"max_staleness is {value} for tickets that begin from now on (before: {before})\n")
    return 0
