"""`areal-like top RUN`: the live view of a running job, in another terminal or on another machine.

It shows what the launcher shows. Without the run's directory, or before metrics.jsonl is there, the curve
begins with this command.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from launch.commands.parser import Parser
from launch.commands.running_job import add_job, end_of, end_text, job_of
from launch.local_job.display import View
from launch.observation.observer import DaemonView, Observation
from launch.observation.polled_steps import PolledSteps
from launch.observation.progress import MetricsTail
from launch.observation.reach import RunningJob
from launch.view.picture import LiveView, picture
from launch.view.plain import PlainView
from launch.view.speed import Eta

_POLL_S = 0.5
_GONE_S = 30.0
"""A buffer on another machine that does not answer for so long ends the view."""


def add_arguments(parser: Parser) -> None:
    """The job."""
    parser.describe(
        "Show the live view of a running job, which `areal-like run` shows too, until Ctrl-C.",
        "top myrun",
        "top --buffer node7:8080 --once",
    )
    add_job(parser)
    parser.add_argument("--once", action="store_true", help="one picture of this moment")


def main(args: argparse.Namespace) -> int:
    """Shows the job until Ctrl-C or its end; returns 1 when it does not answer."""
    job = job_of(args)
    look = Look(job)
    seen = look.now()
    console = Console()
    if not any(view.status is not None for view in seen.daemons.values()):
        sys.stderr.write(end_text(job, end_of(job, seen.daemons)))
        return 1
    if args.once:
        eta = Eta(num_steps=job.config.trainer.num_steps)
        shown = picture(
            seen, config=job.config, eta=eta, phase=phase_of(seen), detail="", width=console.width
        )
        console.print(shown)
        return 0
    view: View = LiveView(job.config, console) if console.is_terminal else PlainView(job.config, console)
    try:
        return _show(job, look, view)
    except KeyboardInterrupt:
        return 0
    finally:
        view.close()


class Look:
    """Looks at a job again and again."""

    def __init__(self, job: RunningJob) -> None:
        self._job = job
        self._tail = MetricsTail(job.paths.metrics) if job.paths is not None else None
        self._polled = PolledSteps()
        self._daemons: dict[str, DaemonView] = {}

    def now(self) -> Observation:
        """The job as it is now."""
        self._daemons = self._job.daemons(before=self._daemons)
        buffers = [view.status for view in self._daemons.values() if view.role == "buffer" and view.status]
        polled = self._polled.see(buffers, unix_s=time.time())
        written = self._tail.read() if self._tail is not None else None
        return Observation(daemons=self._daemons, progress=written if written and written.recent else polled)


def phase_of(seen: Observation) -> str:
    """What the job does, in a word or two."""
    if reason := seen.buffer.get("failed_because") or seen.buffer.get("closed_because"):
        return f"closed: {reason}"
    unready = [name for name, view in seen.daemons.items() if view.not_ready]
    return f"not ready: {', '.join(unready)}" if unready else "running"


def _show(job: RunningJob, look: Look, view: View) -> int:
    heard_s = time.monotonic()
    while True:
        seen = look.now()
        if any(daemon.status is not None for daemon in seen.daemons.values()):
            heard_s = time.monotonic()
        elif job.paths is not None and not seen.daemons:
            view.notice(f"{job.name}: its daemons have ended")
            return 0
        elif time.monotonic() > heard_s + _GONE_S:
            view.notice(f"{job.name}: no answer for {_GONE_S:.0f} s")
            return 1
        view.update(seen, phase=phase_of(seen), detail="")
        time.sleep(_POLL_S)
