"""The interface between a job's state machine and its processes: one observation in, actions out.

`lifecycle.JobLifecycle` returns actions, which `job.LocalJob` performs in order.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from launch.local_job.specs import ChildSpec


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Observation: a process has ended."""

    name: str
    code: int
    """Its exit code; negative: the signal that ended it; 0: the run is finished; DRAINED: it has drained."""
    complaint: str = ""
    """The message for the user that the process printed before exit code 2."""
    last_words: tuple[str, ...] = ()
    """The last lines of its output, and of a traceback in its log."""

    @property
    def description(self) -> str:
        """The exit code in words: `exit code 1`, `killed by SIGKILL`."""
        return describe_exit(self.code)

    def restart_notice(self, pause_s: float) -> str:
        """The notice about a process that is restarted after `pause_s` seconds."""
        return f"{self.name} ended ({self.description}): starting it again in {pause_s:.1f} s"

    def failure_lines(self, headline: str) -> list[str]:
        """The headline, then the last lines of output, indented."""
        return [headline, *(f"  {line}" for line in self.last_words)]


@dataclass(frozen=True)
class Start:
    """Start a process."""

    spec: ChildSpec
    from_newest_checkpoint: bool = False
    """Add `resume=latest`, or `resume=''` when there is no checkpoint at that moment."""


@dataclass(frozen=True)
class Terminate:
    """Send a process its stop signal, on which it drains and ends."""

    name: str


@dataclass(frozen=True)
class Kill:
    """End a process and its process group at once. No `Exit` follows."""

    name: str


@dataclass(frozen=True)
class KillEverything:
    """End every process of the run at once. No `Exit` follows."""


@dataclass(frozen=True)
class HandOver:
    """Ask the trainer to finish its step, write a checkpoint and exit with code 0, for its replacement."""

    address: str | None
    """Address of its HTTP server; None while it has none: it then gets its stop signal instead."""


@dataclass(frozen=True)
class Notice:
    """Tell the user that something has happened."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The end of a trial of the trainer with other settings."""

    settings: tuple[str, ...]
    """`key=value`."""
    refusal: Exit | None = None
    """The exit of the trainer that had them: the next one has the previous settings. None: a trainer was
    ready with them."""


Action = Start | Terminate | Kill | KillEverything | HandOver | Notice | Tried


def describe_exit(code: int) -> str:
    """An exit code in words: `exit code 1`, `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    has_name = -code in set(signal.Signals)  # most real-time signals have none
    return f"killed by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
