"""Runs one process of a run to its end and shows its progress: for replays and supervised training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from areal_like.errors import ConfigError
from launch.local_job.actions import Exit
from launch.local_job.child import ProcessTable
from launch.local_job.display import View
from launch.local_job.specs import DRAINED, ChildSpec
from launch.observation.observer import Observation
from launch.observation.progress import MetricsTail
from launch.run_directory.open_run import OpenRun

_TICK_S = 0.1


class Foreground:
    """Runs the processes of a run one after the other.

    starting -> running --one stop signal--> drained; a second one ends it at once
    """

    def __init__(self, run: OpenRun, *, view: View, num_stops: Callable[[], int]) -> None:
        """`num_stops`: returns the number of stop signals so far."""
        self._processes = ProcessTable(run.paths, lock_fd=run.lock_fd)
        self._tail = MetricsTail(run.paths.metrics)
        self._view, self._num_stops = view, num_stops

    def run(
        self,
        spec: ChildSpec,
        *,
        phase: str,
        notice: str,
        orderly: tuple[int, ...] = (0,),
        on_step: Callable[[], None] = lambda: None,
    ) -> int:
        """Runs a process to its end; returns its exit code if that is in `orderly`, else 1; DRAINED if
        its stop signal ended it.

        `phase`: for the view. `notice`: shown at the first stop signal. `on_step`: called when the process
        has done a step. If this fails, all processes of the run are killed. Raises ConfigError with the
        process's own message for its exit code 2.
        """
        self._processes.start(spec)
        try:
            ended = self._wait(spec.name, phase=phase, notice=notice, on_step=on_step)
        finally:
            self._processes.kill_everything()
        if ended is None:
            return 1
        if ended.code == 2:
            raise ConfigError(ended.complaint)
        if self._num_stops() and ended.code == -spec.stop_signal:
            return DRAINED
        if ended.code not in orderly:
            headline = f"{spec.name} failed ({ended.description}); its last lines:"
            sys.stderr.write("\n".join([headline, *ended.last_words, ""]))
            return 1
        return ended.code

    def _wait(self, name: str, *, phase: str, notice: str, on_step: Callable[[], None]) -> Exit | None:
        """Waits for the process and shows its progress; returns None on a second stop signal."""
        num_obeyed, started_unix_s, has_step = 0, time.time(), False
        while (ended := self._processes.reap(name)) is None:
            if (num_stops := self._num_stops()) > num_obeyed:
                num_obeyed = num_stops
                if num_obeyed > 1:
                    return None
                self._view.notice(notice)
                self._processes.terminate(name)
            progress = self._tail.read()
            newest_s = progress.recent[-1].get("time_unix_s", 0.0) if progress.recent else 0.0
            if not has_step and newest_s > started_unix_s:  # older rows were written by an earlier process
                has_step = True
                on_step()
            self._view.update(Observation(progress=progress), phase=phase, detail="")
            time.sleep(_TICK_S)
        return ended
