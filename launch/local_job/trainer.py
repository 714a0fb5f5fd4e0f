"""The trainer of a local job: its restarts, its progress, and its replacement by another. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launch.local_job.actions import Exit, Start
from launch.local_job.restarts import Restarts, RestartState
from launch.local_job.specs import ChildSpec


class SupervisedTrainer:
    """Trainers of one job, one after the other.

        running --died--> waiting --due--> running          (from the newest checkpoint)
        running --asked to hand over--> ended --> running   (with other settings)

    Deaths in a row count until a trainer gets further than all before it, however long each lived: a step
    whose data kill the trainer is reached again after minutes of health.
    """

    def __init__(self, spec: ChildSpec, *, resume: str, best_step: int, now_s: float) -> None:
        self.spec = spec
        self.restarts = Restarts(now_s=now_s, healthy_s=math.inf)
        self.best_step = best_step
        """Newest step that any trainer of this job has done; -1: none."""
        self.death_report: list[str] = []
        """Lines about the last trainer's death, for the user."""
        self.is_handing_over = False
        """The running trainer was asked to make room for another."""
        self._resumes_at_step = resume.startswith("step:")

    def reached(self, step: int, *, at_s: float) -> None:
        """Notes the newest finished step and when it was done."""
        if step > self.best_step:
            self.best_step = step
            self.restarts.made_progress(at_s=at_s)

    def is_hopeless(self, exit: Exit) -> bool:
        """True when the code failed before the first step was done: another try would fail as well.

        An exit code from 128 on means that a rank was killed by a signal, which is no failure of the code.
        """
        return 0 < exit.code < 128 and self.best_step < 0

    def died(self, exit: Exit, *, report: Sequence[str], now_s: float) -> None:
        """Notes an unexpected end; `restarts.state` then tells whether another trainer follows."""
        self.restarts.died(now_s=now_s)
        if self.restarts.state is not RestartState.GIVEN_UP:
            self.death_report = list(report)
            self.is_handing_over = False  # the next trainer has the new settings anyway

    def start(self, *, was_ready: bool) -> Start:
        """The action that starts the next trainer, from the newest checkpoint.

        Exception: a run that was to go back to step K (`resume=step:K`) has not done so while no trainer was
        ready (`was_ready`). Newer checkpoints may still be there, so the command line stays as it is.
        """
        return Start(self.spec, from_newest_checkpoint=was_ready or not self._resumes_at_step)

    def change_settings(self, settings: Sequence[str]) -> None:
        """Gives the next trainer these `key=value` settings."""
        self.spec = self.spec.with_settings(settings)
