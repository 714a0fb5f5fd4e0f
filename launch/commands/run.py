"""`areal-like run`: the surroundings of a local job: its directory, its signals, its view, and what is said at the end."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console

from areal_like.runtime.logs import JsonFormatter
from launch.local_job.job import LocalJob
from launch.local_job.rundir import open_run
from launch.view.report import show_summary
from launch.view.view import LastingView, LiveView, PlainView, unless_seen_by_nobody


class StopSignals:
    """Counts Ctrl-C and SIGTERM. Repeats within a second are the same one: terminals and supervisors often deliver it twice."""

    def __init__(self) -> None:
        self.count = 0
        self._last_s = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.count == 0 or now_s - self._last_s > 1.0:
            self.count += 1
            self._last_s = now_s


def run_local(argv: Sequence[str]) -> int:
    """`areal-like run`: the job that the command line describes. Raises ConfigError before anything was started."""
    run = open_run(argv)
    started_unix_s = time.time()
    console = Console(stderr=False)
    handler = logging.FileHandler(run.paths.logs / "launcher.log")
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=run.config.daemon.log_level, handlers=[handler], force=True)
    stops = StopSignals()
    console.print(f"run directory {run.paths.root}", markup=False, highlight=False, soft_wrap=True)
    view = LastingView(
        LiveView(run.config, console) if console.is_terminal else PlainView(run.config, console)
    )
    job = LocalJob(run, view=view, num_stops=lambda: stops.count)
    try:
        exit_code = job.run()
    finally:
        view.close()
        run.close()
    with unless_seen_by_nobody():
        if exit_code != 2:
            show_summary(run, console, since_unix_s=started_unix_s)
    with unless_seen_by_nobody():
        for line in job.failure:
            sys.stderr.write(f"{line}\n")
    return exit_code
