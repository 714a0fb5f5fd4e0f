"""`areal-like set RUN key=value ...`: changes what may change while a job runs."""

from __future__ import annotations

import argparse
import sys

from areal_like.errors import ConfigError
from launch.commands.parser import Parser
from launch.commands.running_job import add_job, job_of

CHANGES = ("trainer.lr", "max_staleness", "eval.interval", "daemon.log_level", "evaluate", "checkpoint")
"""For help and completion; the buffer decides."""


def add_arguments(parser: Parser) -> None:
    """The job and the changes."""
    parser.describe(
        "Change a running job from its next step on. max_staleness may rise up to the one that the job was "
        "started with, and tickets that have begun keep theirs. evaluate=now and checkpoint=now act once, "
        "after the step in training.",
        "set myrun trainer.lr=1e-5",
        "set myrun evaluate=now checkpoint=now",
    )
    add_job(parser)
    parser.add_argument("changes", metavar="key=value", nargs="+", help=f"keys: {', '.join(CHANGES)}")


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard has the changes on disk. Raises ConfigError if one of them is refused."""
    wanted: dict[str, str] = {}
    for change in args.changes:
        key, separator, value = change.partition("=")
        if not separator or not key or not value:
            raise ConfigError(f"set {change}: want key=value, as trainer.lr=1e-5")
        if key in wanted:
            raise ConfigError(f"set {change}: {key} is there twice")
        wanted[key] = value
    for change in job_of(args).post_all("set", wanted)[0]["changes"]:
        sys.stdout.write(f"{_told(**change)}\n")
    return 0


def _told(*, key: str, value: str, before: str, step: int) -> str:
    if not before:
        return f"{key}: after step {step}"
    if before == value:
        return f"{key}={value}, as before"
    return f"{key}={value} from step {step} on (before: {before})"
