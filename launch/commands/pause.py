"""`areal-like pause RUN`: grants no leases of training tickets until `areal-like resume RUN`."""

from __future__ import annotations

import argparse
import sys

from launch.commands.running_job import add_job, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job."""
    add_job(parser)


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard of the buffer has it on disk."""
    answers = job_of(args).post_all("pause", {})
    has_changed = any(answer.get("changed") for answer in answers)
    again = "" if has_changed else " (as before)"
    sys.stdout.write(f"the run is paused: held samples are finished, and no new ones begin{again}\n")
    return 0
