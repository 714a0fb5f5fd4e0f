"""Tells from a run's files how and when it ended, its last error, and the command that continues it: for a
run without daemons.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from areal_like.paths import RunPaths
from areal_like.terminal_text import harmless
from launch.formatting import duration
from launch.offline_verbs import offline_verb
from launch.report.columns import read_columns
from launch.report.logs import LogFacts, read_logs
from launch.report.run import modified_unix_s, status_of
from launch.run_directory.kept_settings import read_changes
from launch.run_directory.rundir import checkpoints, has_launcher, is_held
from launch.run_files import read_object

_NUM_CHANGES = 3
"""Number of changes of config.yaml that are shown, the newest."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a run."""

    how: str
    """The word of `launch.report.run.RunStatus`: `finished`, `drained`, `failed` or `ended`."""
    detail: str
    unix_s: float | None
    """When it last wrote a log or a row; None: never."""
    last_error: str
    """Daemon, time and message; empty without one."""
    settings: list[str]
    """The newest changes of `config.yaml`, each on one line."""
    next_command: str
    """The command that continues the run; empty if there is nothing to continue, or no launcher started the
    run."""
    next_note: str
    """What the command does, or what to do instead if there is none."""

    def lines(self) -> list[str]:
        """The end as lines for a terminal."""
        when = (
            ""
            if self.unix_s is None
            else f" at {_clock(self.unix_s)} ({duration(max(0, round(time.time() - self.unix_s)))} ago)"
        )
        return [
            f"{self.how}{when}: {self.detail}",
            *([f"last error: {self.last_error}"] if self.last_error else []),
            *self.settings,
            *([f"next: {self.next_command}  ({self.next_note})"] if self.next_command else []),
            *([f"next: {self.next_note}"] if self.next_note and not self.next_command else []),
        ]


def read_end(root: Path) -> Ended | None:
    """The end of the run in this directory; None while it is running."""
    paths = RunPaths(root)
    if is_held(paths):
        return None
    logs, columns = read_logs(paths.logs), read_columns(paths.metrics)
    status = status_of(paths, logs, read_object(paths.summary), num_rows=len(columns.steps))
    if status.word == "running":
        return None
    times = [at for at in map(modified_unix_s, (paths.metrics, *paths.logs.glob("*.log"))) if at]
    changes = read_changes(paths)[-_NUM_CHANGES:]
    command, note = _next(paths, is_finished=status.word == "finished")
    return Ended(
        how=status.word,
        detail=harmless(status.detail),
        unix_s=max(times, default=None),
        last_error=_last_error(logs),
        settings=[
            f"config.yaml, {_clock(change.unix_s)}, from step {change.step} on ({change.by}): "
            + harmless(change.text)
            for change in changes
        ],
        next_command=command,
        next_note=note,
    )


def _last_error(logs: LogFacts) -> str:
    errors = [message for message in logs.messages if message.level != "WARNING"]
    if not errors:
        return ""
    last = max(errors, key=lambda message: message.last_s)
    return f"{last.daemon}, {_clock(last.last_s)}: {harmless(last.example)}"


def _next(paths: RunPaths, *, is_finished: bool) -> tuple[str, str]:
    """(the command that continues the run, what it does)"""
    steps = checkpoints(paths)
    if not steps and not paths.metrics.exists():
        return "", ""
    if not has_launcher(paths):
        return "", "start its roles again, with resume=latest"
    root, verb = paths.root.resolve(), offline_verb(paths)
    where = "" if root.parent == Path("runs").resolve() else f" runs_dir={shlex.quote(str(root.parent))}"
    command = f"areal-like {verb.verb if verb else 'run'} name={shlex.quote(root.name)}{where} resume=latest"
    if is_finished:
        return f"{command} {verb.section if verb else 'trainer'}.num_steps=MORE", "trains more steps"
    if not steps:
        return command, "from step 0: it has no checkpoint yet"
    return command, f"from step {steps[-1]}, its newest checkpoint"


def _clock(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
