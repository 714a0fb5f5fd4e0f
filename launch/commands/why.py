"""`areal-like why RUN`: what a running job waits on, and which pool limits it when it waits on nothing."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from launch.commands.parser import Parser
from launch.commands.running_job import add_job, end_of, end_text, job_of
from launch.observation.observer import diagnosis


def add_arguments(parser: Parser) -> None:
    """The job."""
    parser.describe(
        "Say what a running job waits on and for how long, down to the engine, and what to do about it. If "
        "it waits on nothing, say which pool limits its speed. Exit code 1 if it waits on something that "
        "should not take so long.",
        "why myrun",
        "why --buffer node7:8080 --json",
    )
    add_job(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Returns 1 if the job waits on something that should not take so long, or no daemon runs."""
    job = job_of(args)
    daemons = job.daemons()
    end = end_of(job, daemons)
    if not args.json and (end is not None or not daemons):
        sys.stdout.write(end_text(job, end))
        return 1
    found = diagnosis(daemons.values()) | {"ended": asdict(end) if end is not None else None}
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else text_of(found))
    return 1 if found["causes"] or end is not None or not daemons else 0


def text_of(found: dict[str, object]) -> str:
    """The diagnosis in lines: each cause with what to do about it, then what waits on the causes."""
    causes, effects = found["causes"], found["effects"]
    assert isinstance(causes, list)
    assert isinstance(effects, list)
    lines = []
    for cause in causes:
        lines += [f"{cause['name']}: {cause['what']}", f"    {cause['remedy']}"]
    lines += [f"so {effect}" if number == 0 else f"   {effect}" for number, effect in enumerate(effects)]
    if not causes:
        lines.append("healthy: nothing waits for long")
        advice = str(found["bottleneck"]) or "which pool is the limit is known after some seconds of training"
        lines.append(f"to make it faster: {advice}" if found["bottleneck"] else advice)
    return "\n".join(lines) + "\n"
