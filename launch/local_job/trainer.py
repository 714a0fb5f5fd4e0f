"""The trainer of a local job: its restarts, progress and replacement. Pure: no processes, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState
from launch.local_job.actions import Exit, Start, Tried
from launch.local_job.specs import DRAINED, ChildSpec


class SupervisedTrainer:
    """The trainer processes of one job, one after the other.

        waiting --due--> running --died--> waiting          (the next one from the newest checkpoint)
        running --asked to hand over--> ended --> running   (with other settings, on trial)
        on trial --ready--> running --ended before--> running   (with the previous settings)

    Only a step beyond all earlier ones resets the count of deaths in a row; the run time of a trainer does
    not: data that crash the trainer at one step crash it every time, after minutes without an error.
    """

    def __init__(self, spec: ChildSpec, *, resume: str, now_s: float) -> None:
        self.spec = spec
        self.restarts = Restarts(RestartLimits(healthy_s=math.inf), now_s=now_s)
        self.best_step = -1
        """Newest step that any trainer of this job, or of the run that it resumes, has finished; -1: none."""
        self.death_report: list[str] = []
        """Lines about the last trainer's death, for the user."""
        self.is_handing_over = False
        """True while the running trainer is asked to end for its replacement."""
        self._resumes_at_step = resume.startswith("step:")
        self._has_started = False
        self._tried: tuple[str, ...] = ()
        """Settings with which no trainer has been ready yet."""
        self._before = spec
        """The spec without them."""
        self.is_on_trial = False
        """True from the start of a trainer with other settings until it is ready, or has ended, or other
        settings are ordered."""
        self.has_untried_settings = False
        """True if the running trainer was started with settings with which none has been ready yet."""
        self._last_endpoint: Mapping[str, Any] = {}

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
        self.restarts.failed(now_s=now_s)
        if self.restarts.state is not RestartState.GIVEN_UP:
            self.death_report = list(report)
            self.is_handing_over = False  # the next trainer has the new settings anyway

    def takes_over(self, ended: Exit) -> bool:
        """Records an orderly end; returns True if the next trainer is to be started."""
        is_handing_over, self.is_handing_over = self.is_handing_over, False
        return is_handing_over and ended.code == DRAINED

    def start(self, *, was_ready: bool) -> Start:
        """The action that starts the first trainer as the run's settings say, the next from the newest
        checkpoint.

        Exception: with `resume=step:K`, the checkpoints after step K may still exist if no trainer was ready
        yet (`was_ready` is False). The command line with `resume=step:K` is then used again.
        """
        is_first, self._has_started = not self._has_started, True
        self.is_on_trial = self.has_untried_settings = bool(self._tried)
        is_at_newest = not is_first and (was_ready or not self._resumes_at_step)
        return Start(self.spec, from_newest_checkpoint=is_at_newest)

    def change_settings(self, settings: Sequence[str]) -> None:
        """Gives the next trainer these `key=value` settings; the trial of earlier settings continues with
        them."""
        if not self._tried:
            self._before = self.spec
        self._tried = (*self._tried, *settings)
        self.spec = self.spec.with_settings(settings)
        self.is_on_trial = False

    def see(self, endpoint: Mapping[str, Any], *, is_ready: bool) -> Tried | None:
        """Records the content of rank 0's endpoint file, empty if there is none.

        Returns the end of a trial when the trainer that is on trial is ready. A file from before its start
        belongs to its predecessor.
        """
        if not self.is_on_trial:
            self._last_endpoint = dict(endpoint)
        elif is_ready and endpoint != self._last_endpoint:
            return self.end_trial()
        return None

    def fall_back(self, ended: Exit) -> Tried:
        """Records that the trainer on trial has ended: the next one has the previous settings."""
        self.spec = self._before
        self.is_handing_over = False
        return self.end_trial(ended)

    def end_trial(self, refusal: Exit | None = None) -> Tried:
        """Records that the settings on trial have worked, or the exit of the trainer that had them."""
        tried, self._tried = self._tried, ()
        self.is_on_trial = self.has_untried_settings = False
        return Tried(settings=tried, refusal=refusal)
