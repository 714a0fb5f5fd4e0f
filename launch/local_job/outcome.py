"""The phases of a local job, and its result: its exit code, and the reason for a failure."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from enum import StrEnum

from launch.local_job.actions import Exit
from launch.local_job.specs import DRAINED

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """The phase of the job."""

    PREPARING = "preparing the model"
    """The model is built; the buffers start."""
    STARTING = "starting"
    """Servers and trainer load the model and connect to the buffers."""
    RUNNING = "running"
    """All daemons are ready."""
    CLOSING = "closing"
    """Daemons end one after another."""


class Outcome:
    """The job counts as successful until a failure is recorded; a later failure replaces an earlier one."""

    def __init__(self) -> None:
        self.exit_code = 0
        """Of the whole job: 0 finished or drained, 1 failed, 2 the user's mistake."""
        self.is_finished = False
        """True when the run is finished: all steps are done."""
        self.failure: list[str] = []
        """The reason for a failure, in lines for the user; empty when the run did not fail."""

    def failed(self, lines: Sequence[str], *, exit_code: int) -> None:
        """Records a failure."""
        self.exit_code, self.failure = exit_code, list(lines)
        for line in lines:
            log.error("%s", line)

    def overran(self) -> None:
        """Records that a process did not end in time and was killed: exit code 1."""
        self.exit_code = self.exit_code or 1

    def note_exit_while_closing(self, ended: Exit) -> None:
        """Records an exit during the shutdown; only a failure of the trainer makes the run fail."""
        # torchrun exits with 128 + the number of the signal that ended one of its ranks.
        was_terminated = ended.code in (0, DRAINED, -signal.SIGTERM, 128 + signal.SIGTERM)
        if ended.name == "trainer" and not was_terminated and not self.failure:
            headline = f"trainer failed while it drained ({ended.description}); its last lines:"
            self.failed(ended.failure_lines(headline), exit_code=1)
        elif not was_terminated and ended.code != -signal.SIGINT:
            log.warning("%s ended while closing: %s", ended.name, ended.description)
