"""`areal-like uncordon RUN SERVER`: grants a cordoned rollout server leases again."""

from __future__ import annotations

import argparse
import sys

from launch.commands.running_job import add_job, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job and SERVER."""
    add_job(parser)
    parser.add_argument("server", metavar="SERVER", help="its name, e.g. rollout-1")


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard of the buffer has it on disk."""
    answers = job_of(args).post_all("uncordon", {"server": args.server})
    has_changed = any(answer.get("changed") for answer in answers)
    sys.stdout.write(f"{args.server} gets leases again{'' if has_changed else ', as before'}\n")
    return 0
