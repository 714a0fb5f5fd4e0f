"""`areal-like status|top|why RUN`: the state of a running job, its live view, and what it waits on.

`status --watch` and `top` look at the job in the same loop and draw it with different views. `top` shows what
the launcher shows; without the run's directory, or before metrics.jsonl is there, its curve begins with the
command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launch.commands.parser import argument, command, flag, seconds
from launch.commands.running_job import JOB, job_of
from launch.local_job.display import View
from launch.observation.job_report import job_report
from launch.observation.observer import DaemonView, Observation, diagnosis
from launch.observation.polled_steps import PolledSteps
from launch.observation.progress import MetricsTail
from launch.observation.reach import RunningJob
from launch.report.ended import Ended, read_end
from launch.run_directory.rundir import is_over
from launch.view.picture import LiveView, picture
from launch.view.plain import PlainView
from launch.view.speed import Eta
from launch.view.status import bound_line, daemon_table, rates_line, server_table, steps_line, tickets_line

_WATCH_S = 2.0
_TOP_S = 0.5
_GONE_S = 30.0
"""`top` ends when a buffer on another machine has not responded for this long."""
_NUM_CHANGES = 5
"""Changes of settings that are shown; --json has more."""


@command(
    "status",
    "Show the daemons, rates, leases and weights of a running job, or how a run ended and how to continue "
    "it. Exit code 1 if no daemon responds.",
    JOB,
    flag("--json", "one object, for programs"),
    argument(
        "--watch",
        nargs="?",
        const=_WATCH_S,
        type=seconds(0.1, 86400, hint="put RUN before --watch"),
        metavar="SECONDS",
        help=f"show it again every SECONDS ({_WATCH_S:g}) until Ctrl-C; with --json one line each time",
    ),
    examples=["status myrun", "status myrun --watch 5", "status --buffer node7:8080 --keys keys --json"],
)
def status(args: argparse.Namespace) -> int:
    """Prints the state; returns 1 when no daemon responds.

    Raises ConfigError without such a run, or without the operator's token of a run with keys.
    """
    job, console = job_of(args), Console()
    if args.watch is not None:
        view = _StatusView(job, console, as_json=args.json)
        return _watch(Look(job), view, interval_s=args.watch, ends_with_job=False)
    daemons = job.daemons()
    report, ended = _report(job, daemons)
    if args.json:
        print(json.dumps(report, indent=2))
    elif ended:
        sys.stdout.write(ended)  # a command to copy must not be wrapped
    else:
        console.print(_drawn(daemons, report, width=console.width))
    return 0 if report["answers"] else 1


@command(
    "top",
    "Show the live view of a running job, which `areal-like run` shows too, until Ctrl-C.",
    JOB,
    flag("--once", "one picture of this moment"),
    examples=["top myrun", "top --buffer node7:8080 --once"],
)
def top(args: argparse.Namespace) -> int:
    """Shows the job until Ctrl-C or its end; returns 1 when it does not respond."""
    job, console = job_of(args), Console()
    look = Look(job)
    seen = look.now()
    if not _responds(seen.daemons):
        sys.stderr.write(_end_text(job, _end_of(job, seen.daemons)))
        return 1
    if args.once:
        eta = Eta(num_steps=job.config.trainer.num_steps)
        phase, width = phase_of(seen), console.width
        console.print(picture(seen, config=job.config, eta=eta, phase=phase, detail="", width=width))
        return 0
    view: View = LiveView(job.config, console) if console.is_terminal else PlainView(job.config, console)
    return _watch(look, view, interval_s=_TOP_S, ends_with_job=True)


@command(
    "why",
    "Say what a running job waits on and for how long, down to the engine, and what to do about it. If it "
    "waits on nothing, say which pool limits its speed. Exit code 1 if it waits on something that should not "
    "take so long.",
    JOB,
    flag("--json", "print one JSON object"),
    examples=["why myrun", "why --buffer node7:8080 --json"],
)
def why(args: argparse.Namespace) -> int:
    """Returns 1 if the job waits on something that should not take so long, or no daemon runs."""
    job = job_of(args)
    daemons = job.daemons()
    end = _end_of(job, daemons)
    if not args.json and (end is not None or not daemons):
        sys.stdout.write(_end_text(job, end))
        return 1
    found = diagnosis(daemons.values()) | {"ended": asdict(end) if end is not None else None}
    sys.stdout.write(json.dumps(found, indent=2) + "\n" if args.json else diagnosis_text(found))
    return 1 if found["causes"] or end is not None or not daemons else 0


class Look:
    """Looks at a job again and again."""

    def __init__(self, job: RunningJob) -> None:
        self.job = job
        self._tail = MetricsTail(job.paths.metrics) if job.paths is not None else None
        self._polled = PolledSteps()
        self._daemons: dict[str, DaemonView] = {}

    def now(self) -> Observation:
        """The job as it is now."""
        self._daemons = self.job.daemons(before=self._daemons)
        buffers = [view.status for view in self._daemons.values() if view.role == "buffer" and view.status]
        polled = self._polled.see(buffers, unix_s=time.time())
        written = self._tail.read() if self._tail is not None else None
        return Observation(daemons=self._daemons, progress=written if written and written.recent else polled)


def _watch(look: Look, view: View, *, interval_s: float, ends_with_job: bool) -> int:
    """Shows the job until Ctrl-C; with `ends_with_job` also until its daemons have ended or stopped
    responding.

    Returns the exit code: 1 if they do not respond at the end.
    """
    job, heard_s, responds = look.job, time.monotonic(), False
    try:
        while True:
            seen = look.now()
            if responds := _responds(seen.daemons):
                heard_s = time.monotonic()
            elif ends_with_job and job.paths is not None and not seen.daemons:
                view.notice(f"{job.name}: its daemons have ended")
                return 0
            elif ends_with_job and time.monotonic() > heard_s + _GONE_S:
                view.notice(f"{job.name}: no response for {_GONE_S:.0f} s")
                return 1
            view.update(seen, phase=phase_of(seen), detail="")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0 if ends_with_job or responds else 1
    finally:
        view.close()


class _StatusView:
    """A `View` of `status --watch`: redrawn on a terminal, else a text or a line of JSON each time."""

    def __init__(self, job: RunningJob, console: Console, *, as_json: bool) -> None:
        self._job, self._console, self._as_json = job, console, as_json
        is_redrawn = console.is_terminal and not as_json
        self._live = Live(console=console, auto_refresh=False) if is_redrawn else None
        if self._live is not None:
            self._live.start()

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Shows the state."""
        report, ended = _report(self._job, seen.daemons)
        if self._as_json:
            print(json.dumps({"time_unix_s": round(time.time(), 3)} | report), flush=True)
            return
        drawn = Text(ended) if ended else _drawn(seen.daemons, report, width=self._console.width)
        if self._live is not None:
            self._live.update(drawn, refresh=True)
        else:
            self.notice(time.strftime("%H:%M:%S"))
            self._console.print(drawn)
            self._console.print()

    def notice(self, text: str) -> None:
        """Prints one line."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """Ends the redrawing; the last state stays on the screen."""
        if self._live is not None:
            self._live.stop()


def _responds(daemons: Mapping[str, DaemonView]) -> bool:
    return any(view.status is not None for view in daemons.values())


def phase_of(seen: Observation) -> str:
    """The phase of the job, in a word or two."""
    if reason := seen.buffer.get("failed_because") or seen.buffer.get("closed_because"):
        return f"closed: {reason}"
    unready = [name for name, view in seen.daemons.items() if view.not_ready]
    return f"not ready: {', '.join(unready)}" if unready else "running"


def _report(job: RunningJob, daemons: Mapping[str, DaemonView]) -> tuple[dict[str, Any], str]:
    """(the state as one object, how the run has ended in words; empty while it has daemons)"""
    end = _end_of(job, daemons)
    report = job_report(job.config, daemons) | {"ended": asdict(end) if end is not None else None}
    return report, _end_text(job, end) if end is not None or not daemons else ""


def _end_of(job: RunningJob, daemons: Mapping[str, DaemonView]) -> Ended | None:
    """How the run has ended; None while it is running, or if its directory cannot be seen.

    Killed daemons have left their addresses. One that does not respond and was started by hand may also be
    stopped.
    """
    if job.paths is None or _responds(daemons):
        return None
    return read_end(job.paths.root) if not daemons or is_over(job.paths) else None


def _end_text(job: RunningJob, end: Ended | None) -> str:
    """The text for a command that finds no daemon: how the run has ended, and what to do next."""
    return "\n".join([f"{job.name}: no daemon is running", *(end.lines() if end is not None else [])]) + "\n"


def held_lines(buffer: Mapping[str, Any]) -> list[str]:
    """What an operator has paused or cordoned, from a buffer's /status."""
    cordoned = [str(name) for name in buffer.get("cordoned") or ()]
    return [
        *(["paused by an operator: `areal-like resume RUN` ends it"] if buffer.get("paused") else []),
        *([f"cordoned: {', '.join(cordoned)}"] if cordoned else []),
    ]


def change_lines(buffer: Mapping[str, Any]) -> list[str]:
    """What an operator has changed during the run, from a buffer's /status, the newest last."""
    rows = [row for row in buffer.get("changes") or () if row.get("origin") == "operator"]
    return [
        f"after step {row['step']}: {row['key']}"
        if row["value"] == "now"
        else f"from step {row['step']} on: {row['key']}={row['value']}"
        for row in rows[-_NUM_CHANGES:]
    ]


def _drawn(daemons: Mapping[str, DaemonView], report: dict[str, Any], *, width: int) -> RenderableType:
    return Group(*_parts(daemons, report, width=width))


def _parts(
    daemons: Mapping[str, DaemonView], report: dict[str, Any], *, width: int
) -> Iterable[RenderableType]:
    for cause in diagnosis(daemons.values())["causes"]:
        yield Text(f"waits on {cause['name']}: {cause['what']}", style="yellow")
    yield daemon_table(list(daemons.values()), width=width)
    seen = Observation(daemons=dict(daemons))
    if seen.buffer:
        if (servers := server_table(report)) is not None:
            yield servers
        yield from (steps_line(report), bound_line(report), rates_line(report), tickets_line(seen))
        yield from (Text(line, style="yellow") for line in held_lines(seen.buffer))
        yield from (Text(line) for line in change_lines(seen.buffer))
    for daemon in daemons.values():
        if url := daemon.endpoint.get("sessions"):
            yield Text(f"{daemon.name}: sessions for agents at {url}")


def diagnosis_text(found: Mapping[str, Any]) -> str:
    """The diagnosis in lines: each cause with what to do about it, then what waits on the causes."""
    lines = []
    for cause in found["causes"]:
        lines += [f"{cause['name']}: {cause['what']}", f"    {cause['remedy']}"]
    lines += [
        f"so {effect}" if number == 0 else f"   {effect}" for number, effect in enumerate(found["effects"])
    ]
    if not found["causes"]:
        lines.append("healthy: nothing waits for long")
        advice = str(found["bottleneck"]) or "which pool is the limit is known after some seconds of training"
        lines.append(f"to make it faster: {advice}" if found["bottleneck"] else advice)
    return "\n".join(lines) + "\n"
