"""`areal-like doctor [CONFIG]`: checks a machine before a run: ports, disks, versions, GPUs, clocks, keys."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console
from rich.text import Text

from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from launch.commands.configuration import configuration, settings_of
from launch.commands.parser import JSON, argument, command, flag
from launch.doctor.checks import Finding, Level
from launch.doctor.gathering import ROLES, findings
from launch.observation.reach import RunningJob
from launch.view.status import plain_table

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}


@command(
    "doctor",
    "Check this machine before a run: ports, names, disks, versions, GPUs, limits and keys. Exit code 1 on "
    "errors; warnings do not count.",
    *configuration(),
    argument(
        "--role",
        action="append",
        choices=ROLES,
        metavar="ROLE",
        help="only what this role needs here (buffer, trainer or rollout); may be repeated",
    ),
    argument(
        "--buffer",
        action="append",
        metavar="HOST:PORT",
        help="compare clocks with a running job, at its buffer's HTTP server",
    ),
    JSON,
    flag("--all", "also show what is in order"),
    examples=[
        "doctor",
        "doctor job.yaml --role trainer",
        "doctor job.yaml --role rollout --buffer node7:8080",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if one of them is an error. Raises ConfigError for a wrong setting."""
    config = load_config(settings_of("doctor", args))
    found = list(findings(config, args.role or ROLES, job=_job(config, args.buffer)))
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        _show(found, shows_all=args.all)
    return int(any(each.level is Level.ERROR for each in found))


def _job(config: Config, addresses: list[str] | None) -> RunningJob | None:
    security = config.security
    if not addresses:
        return None
    return RunningJob.at(addresses, keys=security.keys, tls_certificate=security.tls_certificate)


def _show(found: list[Finding], *, shows_all: bool) -> None:
    rows = [
        (Text(each.level.value, style=_STYLES[each.level]), *map(Text, (each.what, each.found, each.remedy)))
        for each in found
        if shows_all or each.level is not Level.OK
    ]
    console = Console()
    if rows:
        console.print(plain_table(("", "what", "found", "what to do"), rows))
    counts = {level: sum(each.level is level for each in found) for level in Level}
    summary = (
        f"{len(found)} checks: {counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings, "
        f"{counts[Level.OK]} in order"
    )
    console.print(summary, highlight=False, markup=False)
