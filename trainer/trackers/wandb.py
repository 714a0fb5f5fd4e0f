"""Weights & Biases, offline unless the user asks for the network.

The mode is `mode`, else WANDB_MODE, else `online` if WANDB_API_KEY is set, else `offline`: a job must not
send data to a server only because a package is installed. (A login in ~/.netrc alone does not count.)

A run keeps its id, in a file of its directory, so that W&B has one series for it. Steps that are trained
again replace the earlier ones:

* Online the run is rewound to the resumed step (`resume_from`). A server that cannot rewind refuses; then a
  run with a new id gets all rows.
* Offline every start writes a complete directory, including earlier rows, and the directories of earlier
  starts are renamed to `replaced-...`, which `wandb sync` does not send.

W&B's own data collection is off: the command line, the host, git, installed packages, the program's output,
and measurements of the machine (`system_metrics=true` turns these on).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from trainer.trackers.base import TRACKERS, Aliases, TrackedRow, TrackedRun, Tracker
from trainer.trackers.names import EVALUATION

log = logging.getLogger(__name__)

_EVALUATION_STEP = f"{EVALUATION}/step"
_FINISH_S = 15
"""W&B stops waiting for its server this long after the end of a run; the rest stays on disk."""
_INIT_S = 60


@TRACKERS.register("wandb")
@dataclass(kw_only=True)
class WeightsAndBiases(Tracker):
    """Writes a run of W&B. The API key comes from WANDB_API_KEY or `wandb login`, never from a setting."""

    project: str = "areal-like"
    """Project on the server."""
    entity: str = ""
    """User or team that has the project; empty: the user's default."""
    group: str = ""
    """Group of runs."""
    tags: Sequence[str] = ()
    """Tags of the run."""
    mode: Literal["", "online", "offline"] = ""
    """`online`: sends while the run goes on. `offline`: writes a directory for `wandb sync`. Empty:
    WANDB_MODE, else `online` if WANDB_API_KEY is set, else `offline`."""
    system_metrics: bool = False
    """Also W&B's own measurements of processors, memory and GPUs."""
    aliases: Aliases = "none"
    """`verl`: also verl's names of the numbers that both have."""
    package = "wandb"
    _run: Any = field(init=False, repr=False)
    _step: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if isinstance(self.tags, str) or not all(isinstance(tag, str) for tag in self.tags):
            raise ConfigError(f"trackers.tags: expected a list of texts, got {self.tags!r}")

    def open(self, run: TrackedRun) -> None:
        folder = RunPaths(run.root).wandb
        folder.mkdir(parents=True, exist_ok=True)
        mode = self.mode or _mode_of(os.environ)
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of W&B's own errors
        import wandb

        run_id, is_known = _read_id(folder)
        if mode == "offline":
            _set_aside(folder, run_id)
            self._init(run, run_id, mode=mode)
            rows = run.earlier_rows()
        else:
            rows = self._open_online(run, run_id, is_known=is_known, refusals=(wandb.Error,))
        for pattern in (f"{EVALUATION}/*", "val-core/*"):
            self._run.define_metric(pattern, step_metric=_EVALUATION_STEP)
        for row in rows:
            self.log(row)
        directory = Path(self._run.settings.sync_dir)
        log.info("wandb is %s: %s", mode, f"`wandb sync {directory}`" if mode == "offline" else self._run.url)

    def log(self, row: TrackedRow) -> None:
        """Writes the row. W&B does not accept a row of an earlier step: an evaluation joins the newest
        one."""
        self._step = max(self._step, row.step)
        numbers = {**row.numbers, "_timestamp": row.time_unix_s}
        if row.is_evaluation:
            numbers[_EVALUATION_STEP] = row.step
        self._run.log(numbers, step=self._step)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Adds the run's summary under `summary/`; W&B's own summary has the last row."""
        self._run.summary.update({f"summary/{name}": value for name, value in summary.items()})

    def close(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """Ends W&B's process: the interpreter would wait for it at exit while it retries its server. Data
        that it has not sent are in the run's directory, for `wandb sync`."""
        for pid in _children_named("wandb-core"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _open_online(
        self, run: TrackedRun, run_id: str, *, is_known: bool, refusals: tuple[type[Exception], ...]
    ) -> Iterator[TrackedRow]:
        """Opens the run on the server; returns the earlier rows that it lacks."""
        if not (is_known and run.is_rewound):
            self._init(run, run_id, mode="online", resume="allow")
            return iter(()) if is_known else run.earlier_rows()
        try:
            if run.start_step == 0:
                raise refusals[0]("there is no step before the first one")
            self._init(run, run_id, mode="online", resume_from=f"{run_id}?_step={run.start_step - 1}")
        except refusals as error:
            new_id = _new_id(RunPaths(run.root).wandb)
            log.warning("wandb cannot rewind the run %s (%s): its rows go to a new one", run_id, error)
            self._init(run, new_id, mode="online")
            return run.earlier_rows()
        return _after_the_last_step(run.earlier_rows())

    def _init(self, run: TrackedRun, run_id: str, *, mode: str, **resume: str) -> None:
        import wandb

        wanted: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "host": "",
            "init_timeout": _INIT_S,
            "finish_timeout": _FINISH_S,
            "x_disable_meta": True,
            "x_save_requirements": False,
            "x_disable_machine_info": not self.system_metrics,
            "x_disable_stats": not self.system_metrics,
        }
        known = wandb.Settings.model_fields
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity or None,
            "group": self.group or None,
            "tags": list(self.tags) or None,
            "name": run.name,
            "id": run_id,
            "mode": mode,
            "dir": str(run.root),
            "config": dict(run.config),
            "settings": wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
        }
        self._run = wandb.init(**(arguments | resume))


def _mode_of(environment: Mapping[str, str]) -> str:
    if mode := environment.get("WANDB_MODE"):
        return mode
    return "online" if environment.get("WANDB_API_KEY") else "offline"


def _children_named(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just ended
            pid, rest = path.read_text(errors="replace").split(" (", 1)
            comm, _, columns = rest.rpartition(") ")
            if comm == name and int(columns.split()[1]) == os.getpid():
                found.append(int(pid))
    return found


def _read_id(folder: Path) -> tuple[str, bool]:
    """Returns (id of the run at W&B, True if an earlier start created it)."""
    try:
        return (folder / "run_id").read_text().strip(), True
    except FileNotFoundError:
        return _new_id(folder), False


def _new_id(folder: Path) -> str:
    run_id = secrets.token_hex(6)
    (folder / "run_id").write_text(f"{run_id}\n")
    return run_id


def _after_the_last_step(rows: Iterator[TrackedRow]) -> Iterator[TrackedRow]:
    """The evaluations after the last row of a step: they belong to later steps, which were removed."""
    late: list[TrackedRow] = []
    for row in rows:
        late = [*late, row] if row.is_evaluation else []
    return iter(late)


def _set_aside(folder: Path, run_id: str) -> None:
    """Renames the directories that earlier offline starts of the run have written."""
    for earlier in folder.glob(f"offline-run-*-{run_id}"):
        earlier.rename(earlier.with_name(f"replaced-{earlier.name.removeprefix('offline-')}"))
