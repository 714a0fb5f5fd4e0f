"""`areal-like status RUN`: the state of a running job: daemons, rates, leases, weights, tickets."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launch.commands.parser import Parser
from launch.commands.running_job import add_job, end_of, end_text, job_of
from launch.observation.job_report import job_report
from launch.observation.observer import DaemonView, Observation, diagnosis
from launch.observation.reach import RunningJob
from launch.view.status import daemon_table, rates_line, server_table, steps_line, tickets_line

_WATCH_S = 2.0
_NUM_CHANGES = 5
"""Changes of settings that are shown; --json has more."""


def add_arguments(parser: Parser) -> None:
    """The job, and how to show it."""
    parser.describe(
        "Show the daemons, rates, leases and weights of a running job, or how a run has ended and what "
        "continues it. Exit code 1 if no daemon responds.",
        "status myrun",
        "status myrun --watch 5",
        "status --buffer node7:8080 --keys keys --json",
    )
    add_job(parser)
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=_WATCH_S,
        type=_interval_s,
        metavar="SECONDS",
        help=f"show it again every SECONDS ({_WATCH_S:g}) until Ctrl-C; with --json one line each time",
    )


def _interval_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds; put RUN before it") from None
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text}: use 0.1 to 86400 seconds")
    return seconds


def main(args: argparse.Namespace) -> int:
    """Prints the state; returns 1 when no daemon answers.

    Raises ConfigError without such a run, or without the operator's token of a run with keys.
    """
    job = job_of(args)
    if args.watch is not None:
        return _watch(job, interval_s=args.watch, as_json=args.json)
    daemons = job.daemons()
    report = _report(job, daemons)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    elif (text := _end(job, daemons)) is not None:
        sys.stdout.write(text)  # a command to copy must not be wrapped
    else:
        console = Console()
        console.print(_drawn(job, daemons, report, width=console.width))
    return 0 if report["answers"] else 1


def _watch(job: RunningJob, *, interval_s: float, as_json: bool) -> int:
    """Shows the state until Ctrl-C; returns 1 when no daemon has answered at the end."""
    console = Console()
    daemons: dict[str, DaemonView] = {}
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    answers = False
    try:
        if live is not None:
            live.start()
        while True:
            daemons = job.daemons(before=daemons)
            report = _report(job, daemons)
            answers = report["answers"]
            if as_json:
                sys.stdout.write(json.dumps({"time_unix_s": round(time.time(), 3)} | report) + "\n")
                sys.stdout.flush()
            elif live is not None:
                live.update(_drawn(job, daemons, report, width=console.width), refresh=True)
            else:
                console.print(time.strftime("%H:%M:%S"), highlight=False)
                console.print(_drawn(job, daemons, report, width=console.width))
                console.print()
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0 if answers else 1
    finally:
        if live is not None:
            live.stop()


def _report(job: RunningJob, daemons: dict[str, DaemonView]) -> dict[str, Any]:
    end = end_of(job, daemons)
    return job_report(job.config, daemons) | {"ended": asdict(end) if end is not None else None}


def _end(job: RunningJob, daemons: dict[str, DaemonView]) -> str | None:
    """How the run has ended; None while it has daemons."""
    end = end_of(job, daemons)
    return end_text(job, end) if end is not None or not daemons else None


def held_lines(buffer: dict[str, Any]) -> list[str]:
    """What an operator holds back, of a buffer's /status."""
    cordoned = [str(name) for name in buffer.get("cordoned") or ()]
    return [
        *(["paused by an operator: `areal-like resume RUN` ends it"] if buffer.get("paused") else []),
        *([f"cordoned: {', '.join(cordoned)}"] if cordoned else []),
    ]


def change_lines(buffer: dict[str, Any]) -> list[str]:
    """What an operator has changed while the run went on, the newest last, of a buffer's /status."""
    rows = [row for row in buffer.get("changes") or () if row.get("origin") == "operator"]
    return [
        f"after step {row['step']}: {row['key']}"
        if row["value"] == "now"
        else f"from step {row['step']} on: {row['key']}={row['value']}"
        for row in rows[-_NUM_CHANGES:]
    ]


def _drawn(
    job: RunningJob, daemons: dict[str, DaemonView], report: dict[str, Any], *, width: int
) -> RenderableType:
    if (text := _end(job, daemons)) is not None:
        return Text(text)
    causes = diagnosis(daemons.values())["causes"]
    parts: list[RenderableType] = [
        Text(f"waits on {cause['name']}: {cause['what']}", style="yellow") for cause in causes
    ]
    parts.append(daemon_table(list(daemons.values()), width=width))
    seen = Observation(daemons=daemons)
    if seen.buffer:
        if (servers := server_table(report)) is not None:
            parts.append(servers)
        parts += [steps_line(report), rates_line(report), tickets_line(seen)]
        parts += [Text(line, style="yellow") for line in held_lines(seen.buffer)]
        parts += [Text(line) for line in change_lines(seen.buffer)]
    for daemon in daemons.values():
        if url := daemon.endpoint.get("sessions"):
            parts.append(Text(f"{daemon.name}: sessions for agents at {url}"))
    return Group(*parts)
