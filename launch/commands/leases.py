"""`areal-like pause|resume RUN`, `cordon|uncordon RUN SERVER`: whether leases are granted, to all or to one.

Each is one request to every shard of the buffer, which has it on disk before it responds.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from launch.commands.parser import Parser
from launch.commands.running_job import add_job, add_server, job_of


class _Verb(NamedTuple):
    description: str
    done: str
    """Printed afterwards. SERVER stands for the server's name."""


_VERBS = {
    "pause": _Verb(
        "Grant no leases for training until `areal-like resume`: samples that have begun are finished, and "
        "evaluations go on.",
        "the run is paused: held samples are finished, and no new ones begin",
    ),
    "resume": _Verb(
        "End a pause. (A run that was stopped continues with `areal-like run name=RUN resume=latest`.)",
        "the run goes on",
    ),
    "cordon": _Verb(
        "Grant one rollout server no new leases: it finishes what it holds and still gets weights.",
        "SERVER gets no new leases",
    ),
    "uncordon": _Verb("Grant a cordoned rollout server leases again.", "SERVER gets leases again"),
}


def add_arguments(parser: Parser) -> None:
    """The job, and SERVER for two of the verbs."""
    verb = parser.verb
    add_job(parser)
    if "SERVER" in _VERBS[verb].done:
        add_server(parser)
        parser.describe(_VERBS[verb].description, f"{verb} myrun rollout-1")
    else:
        parser.describe(_VERBS[verb].description, f"{verb} myrun", f"{verb} --buffer node7:8080")
    parser.set_defaults(verb=verb, server=None)


def main(args: argparse.Namespace) -> int:
    """Returns 0 when every shard of the buffer has it on disk."""
    body = {} if args.server is None else {"server": args.server}
    responses = job_of(args).post_all(args.verb, body)
    has_changed = any(response.get("changed") for response in responses)
    done = _VERBS[args.verb].done.replace("SERVER", args.server or "")
    sys.stdout.write(f"{done}{'' if has_changed else ', as before'}\n")
    return 0
