"""The trainer of a local job: its restarts, progress and replacement. Pure: no processes, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launch.local_job.actions import Exit, Start
from launch.local_job.restarts import Restarts, RestartState
from launch.local_job.specs import DRAINED, ChildSpec


class SupervisedTrainer:
    """The trainer processes of one job, one after the other.

        running --died--> waiting --due--> running          (from the newest checkpoint)
        running --asked to hand over--> ended --> running   (with other settings)

    Only a step beyond all earlier ones resets the count of deaths in a row; the run time of a trainer does
    not. Data that kill the trainer at one step kill it again each time, after minutes without an error.
    """

    def __init__(self, spec: ChildSpec, *, resume: str, best_step: int, now_s: float) -> None:
        self.spec = spec
        self.restarts = Restarts(now_s=now_s, healthy_s=math.inf)
        self.best_step = best_step
        """Newest step that any trainer of this job has finished; -1: none."""
        self.death_report: list[str] = []
        """Lines about the last trainer's death, for the user."""
        self.is_handing_over = False
        """True while the running trainer is asked to end for its replacement."""
        self._resumes_at_step = resume.startswith("step:")

    def reached(self, step: int, *, at_s: float) -> None:
        """Records the newest finished step and the time at which it was finished."""
        if step > self.best_step:
            self.best_step = step
            self.restarts.made_progress(at_s=at_s)

    def is_hopeless(self, ended: Exit) -> bool:
        """True when the code failed before the first step was finished: a restart would fail as well.

        An exit code of 128 or more means that a signal killed a rank, which is not an error in the code.
        """
        return 0 < ended.code < 128 and self.best_step < 0

    def died(self, ended: Exit, *, report: Sequence[str], now_s: float) -> None:
        """Records an unexpected end; `restarts.state` is then WAITING or GIVEN_UP."""
        self.restarts.died(now_s=now_s)
        if self.restarts.state is not RestartState.GIVEN_UP:
            self.death_report = list(report)
            self.is_handing_over = False  # the next trainer has the new settings anyway

    def takes_over(self, ended: Exit) -> bool:
        """Records an orderly end; returns True if the next trainer is to be started."""
        is_handing_over, self.is_handing_over = self.is_handing_over, False
        return is_handing_over and ended.code == DRAINED

    def start(self, *, was_ready: bool) -> Start:
        """The action that starts the next trainer, from the newest checkpoint.

        Exception: with `resume=step:K`, the checkpoints after step K may still exist if no trainer was ready
        yet (`was_ready` is False). The command line with `resume=step:K` is then used again.
        """
        return Start(self.spec, from_newest_checkpoint=was_ready or not self._resumes_at_step)

    def change_settings(self, settings: Sequence[str]) -> None:
        """Gives the next trainer these `key=value` settings."""
        self.spec = self.spec.with_settings(settings)
