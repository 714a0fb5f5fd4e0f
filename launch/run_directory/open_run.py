"""Chooses the directory that a job runs in: a new one, or the directory of an earlier run to resume.

A run directory belongs to one run; neither a finished nor an unfinished run is ever overwritten. A new job
therefore needs a free name (a job without a name is numbered: default, default-2, ...), or resumes the
existing run (`resume=latest`, `resume=step:K`, or `resume=auto`, which does either). Resuming starts from the
run's own configuration and not from the defaults, so that a forgotten override cannot change a run halfway.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.automatic_settings import dtype_choice, resolved
from areal_like.config import Config
from areal_like.config.gpus import check_gpus_are_separate
from areal_like.errors import ConfigError
from areal_like.paths import BUILT_MODELS, RunPaths
from areal_like.runtime.command_line import (
    GROUPS,
    SCALE,
    load_config,
    save_config,
    with_kept_choices,
)
from launch.offline_verbs import offline_verb
from launch.run_directory.kept_settings import check_resume, keep, left_out, stored
from launch.run_directory.rundir import (
    InUseError,
    checkpoints,
    holds_run,
    is_held,
    is_trained,
    lock,
    remove_ledgers,
    remove_unbegun,
)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run directory whose lock this process holds."""

    config: Config
    paths: RunPaths
    lock_fd: int
    """The lock's file descriptor; pass it to every child."""
    announcement: tuple[str, ...] = ()
    """Lines for the user: the choice that was made, and the settings for other choices."""
    is_finished: bool = False
    """True if a resume found that all steps are trained: nothing is to be started."""
    is_created: bool = False
    """True if this launch has created the directory."""
    is_resumed: bool = False
    """True if an earlier launch started the run; `config.yaml` has the settings of that launch."""
    first_step: int = 0
    """Number of completed steps from which the run continues."""

    @property
    def config_file(self) -> Path:
        """The file with the settings of this launch, for its processes."""
        return self.paths.next_config if self.is_resumed else self.paths.config

    def keep_settings(self) -> None:
        """Makes the settings of this launch those of the run: they have worked."""
        if self.is_resumed:
            keep(self.config, self.paths, by="resume", step=self.first_step)

    def remove_if_created(self) -> None:
        """Removes the directory of a job that is refused before it has started, if this launch created it."""
        if self.is_created:
            remove_unbegun(self.paths)

    def close(self) -> None:
        """Releases the directory (children that inherited the lock still hold it)."""
        self.paths.next_config.unlink(missing_ok=True)
        os.close(self.lock_fd)


def open_run(argv: Sequence[str], *, verb: str = "run", is_dry: bool = False) -> OpenRun:
    """Resolves the command line of `areal-like run`, takes the directory and writes `config_file` there.

    `verb`: `run`, or one of `offline_verbs`, whose run is called NAME-VERB unless `name=` is in `argv`,
    because one file may have the settings of both. `is_dry`: nothing is written and no lock is taken. Raises
    ConfigError for a wrong setting, a directory that is in use or holds another run, or a run that cannot be
    resumed.
    """
    config = load_config(argv)
    if verb != "run" and not any(arg.startswith("name=") for arg in argv):
        config = dataclasses.replace(config, name=f"{config.name}-{verb}")
    is_named = any(arg.startswith("name=") or arg == "--config" for arg in argv)
    resumes = is_begun(RunPaths.of(config)) if config.resume == "auto" else bool(config.resume)
    is_named = is_named or config.resume == "auto"  # the next start must find the same directory
    if resumes:
        run = _resume(config, argv, verb=verb, is_dry=is_dry)
    else:
        if verb != "run":  # no choice to announce
            config = config.with_resolved_objective()
        else:
            check_gpus_are_separate(config)
        run = _start(config, is_named=is_named, is_dry=is_dry)
    return run if is_dry else prepared(run)


def open_replay(recorded: Path, argv: Sequence[str]) -> OpenRun:
    """Opens a new run with the settings of the recorded one, changed by `argv`.

    `buffer.overdue=auto` is what it was in the recorded run, also where the changed settings would resolve it
    to another rule. Raises ConfigError, also for settings that contradict the recorded run's rule.
    """
    own = recorded / "config.yaml"
    rule = f"buffer.overdue={load_config(['--config', str(own)]).overdue}"
    config = with_own_settings(load_config(argv), [rule, *argv], own=own)
    is_named = any(arg.startswith("name=") for arg in argv)
    if config.model.path in BUILT_MODELS:
        built = str(RunPaths(recorded.resolve()).built_model)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=built))
    has_runs_dir = any(arg.startswith("runs_dir=") for arg in argv)
    runs_dir = config.runs_dir if has_runs_dir else str(recorded.resolve().parent)
    name = config.name if is_named else f"{recorded.resolve().name}-replay"
    config = dataclasses.replace(config, name=name, runs_dir=runs_dir, resume="")
    return prepared(_start(config, is_named=is_named))


def is_begun(paths: RunPaths) -> bool:
    """True if a launcher has started a run here that can be continued."""
    return paths.config.is_file() and (holds_run(paths) or bool(paths.ledgers))


def prepared(run: OpenRun) -> OpenRun:
    """Removes the traces of earlier processes and writes the configuration."""
    if run.is_finished:  # no process is started
        return run
    try:
        for stale in (*run.paths.endpoints.glob("*.json"), *run.paths.endpoints.glob(".*.json.*")):
            # Including a file that a killed daemon left half written. A server that joined removes its own.
            stale.unlink(missing_ok=True)
        if not run.is_resumed:
            run.paths.config_changes.unlink(missing_ok=True)  # from a job that failed before its first step
        for pattern in ("restart*.json", ".restart*.json"):
            for order in run.paths.root.glob(pattern):  # orders for an earlier launcher, and their outcome
                order.unlink(missing_ok=True)
        for folder in (run.paths.endpoints, run.paths.logs):
            folder.mkdir(exist_ok=True)
        save_config(run.config, run.config_file)
    except OSError as error:
        run.remove_if_created()
        run.close()
        raise ConfigError(f"cannot write to {run.paths.root}: {error.strerror}") from None
    return run


def _check_one_machine(config: Config) -> None:
    if config.trainer.num_hosts > 1:
        raise ConfigError(
            f"trainer.num_hosts={config.trainer.num_hosts}: `areal-like run` starts a job on one "
            "machine; start the roles one by one, and `python -m trainer` on each of the trainer's machines"
        )


_NO_LOCK = -1
"""`lock_fd` of a dry run."""


def _lock(paths: RunPaths, *, is_dry: bool) -> int:
    """Takes the lock; a dry run only raises the same errors."""
    if not is_dry:
        return lock(paths)
    folder = next(path for path in (paths.root, *paths.root.parents) if os.access(path, os.F_OK))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"cannot create the run directory {paths.root}: {folder} is no directory that this user can "
            "write to; choose another runs_dir=..."
        )
    if is_held(paths):
        raise InUseError(f"{paths.root} is in use: wait until that run has ended, or choose another name=...")
    return _NO_LOCK


def _unlock(lock_fd: int) -> None:
    if lock_fd != _NO_LOCK:
        os.close(lock_fd)


def _start(config: Config, *, is_named: bool, is_dry: bool = False) -> OpenRun:
    """A new run under the given name, or under the first free numbered name if none was given."""
    objective, dtype = config.objective_choice, dtype_choice(config)
    config = resolved(config)
    is_narrow = config.model.dtype == "bfloat16"
    _check_one_machine(config)
    run = free_directory(config, is_named=is_named, is_taken=holds_run, refusal=_refusal, is_dry=is_dry)
    if not is_dry:  # a ledger left by a job that failed before its first step
        remove_ledgers(run.paths)
    lines = (*_new_run_announcement(run.paths, config), objective, dtype if is_narrow else "")
    return dataclasses.replace(run, announcement=tuple(filter(None, lines)))


def free_directory(
    config: Config,
    *,
    is_named: bool,
    is_taken: Callable[[RunPaths], bool],
    refusal: Callable[[RunPaths], str],
    is_dry: bool = False,
) -> OpenRun:
    """Takes the directory of a new job: the one with its name or, without a name, the first free numbered
    one.

    `is_taken`: whether a directory already holds a job; `refusal`: the message about one that does. Raises
    ConfigError.
    """
    for number in itertools.count(1):
        candidate = config if number == 1 else dataclasses.replace(config, name=f"{config.name}-{number}")
        paths = RunPaths.of(candidate)
        if not is_named and is_taken(paths):
            continue
        is_created = not paths.root.exists()
        try:
            lock_fd = _lock(paths, is_dry=is_dry)
        except InUseError:
            if is_named:
                raise
            continue
        if not is_taken(paths):
            return OpenRun(config=candidate, paths=paths, lock_fd=lock_fd, is_created=is_created)
        _unlock(lock_fd)
        if is_named:
            raise ConfigError(refusal(paths))
    raise AssertionError("itertools.count ended")


def _refusal(paths: RunPaths) -> str:
    kind = "a finished" if paths.summary.exists() else "an unfinished"
    if steps := checkpoints(paths):
        ways = f"continue it with resume=latest (step {steps[-1]}) or resume=step:K (K: {_listed(steps)})"
    elif paths.ledgers:
        ways = "continue it with resume=latest (from step 0: it has no checkpoint yet)"
    else:
        ways = "remove that directory (it has no checkpoint to resume from)"
    return f"{paths.root} already holds {kind} run: choose another name=..., or {ways}"


def _new_run_announcement(paths: RunPaths, config: Config) -> tuple[str, ...]:
    taken = RunPaths.of(config)
    if paths == taken:
        return (f"new run in {paths.root}",)
    kind = "an earlier run, which stays as it is" if holds_run(taken) else "a run that is in progress"
    choices = "name=NAME starts a new run under another name"
    if checkpoints(taken):
        choices += (
            f"; name={config.name} resume=latest continues {taken.root}, "
            f"resume=step:K from one of its checkpoints ({_listed(checkpoints(taken))})"
        )
    return (f"new run in {paths.root} ({taken.root} holds {kind})", choices)


def _resume(config: Config, argv: Sequence[str], *, verb: str, is_dry: bool) -> OpenRun:
    """The run in the directory that `config` names, resumed at `config.resume`."""
    paths = RunPaths.of(config)
    if not paths.config.is_file():
        raise ConfigError(
            f"resume={config.resume}: there is no run in {paths.root}; choose the run with name=..."
        )
    lock_fd = _lock(paths, is_dry=is_dry)
    try:
        steps = checkpoints(paths)
        made_by = offline_verb(paths)
        if steps and (other := made_by.verb if made_by else "run") != verb:
            raise ConfigError(f"{paths.root} is a run of `areal-like {other}`: continue it with that command")
        # With `auto`, a run whose ledger was in memory also starts again.
        may_begin_again = config.resume == "auto" or (config.resume == "latest" and bool(paths.ledgers))
        begins_again = not steps and may_begin_again
        if not steps and not begins_again:
            raise ConfigError(
                f"resume={config.resume}: {paths.checkpoints} holds no checkpoint; "
                "start again under another name=..."
            )
        if config.resume.startswith("step:") and int(config.resume.removeprefix("step:")) not in steps:
            raise ConfigError(f"resume={config.resume}: the checkpoints kept are {_listed(steps)}")
        lines = _resume_announcement(paths, steps, resume=config.resume)
        if not_kept := left_out(paths):  # its launcher was killed before the daemons were ready
            lines += (f"settings of the last start, which was never ready, are left out: {not_kept}",)
        if "--config" not in argv:
            config = with_own_settings(config, argv, own=paths.config)
        config = with_kept_choices(config, argv, own=paths.config)
        if verb == "run" and (choice := config.objective_choice):
            lines += (choice,)
        config = resolved(config)
        if verb == "run":
            check_gpus_are_separate(config)
        _check_one_machine(config)
        check_resume(stored(paths), config, paths)
        if begins_again and config.resume == "latest":
            config = dataclasses.replace(config, resume="")
    except ConfigError:
        _unlock(lock_fd)
        raise
    # The number of steps of an offline run depends on its rows: its trainer finds out whether any are left.
    may_be_finished = config.resume in ("auto", "latest") and verb == "run"
    is_finished = may_be_finished and is_trained(paths, num_steps=config.trainer.num_steps)
    is_back = config.resume.startswith("step:")
    first_step = int(config.resume.removeprefix("step:")) if is_back else max(steps, default=0)
    if is_finished:
        lines = (f"the run in {paths.root} is finished", "trainer.num_steps=MORE continues it")
    return OpenRun(
        config=config,
        paths=paths,
        lock_fd=lock_fd,
        announcement=lines,
        is_finished=is_finished,
        is_resumed=True,
        first_step=first_step,
    )


def _resume_announcement(paths: RunPaths, steps: Sequence[int], *, resume: str) -> tuple[str, ...]:
    new = "another name=... starts a new run"
    if not steps:  # the run died before its first checkpoint
        groups = ", with the groups in its ledger" if paths.ledgers else ""
        return (f"resume of {paths.root} from step 0{groups} (no checkpoint yet)", new)
    if resume in ("latest", "auto"):
        choices = f"resume=step:K goes back to an earlier checkpoint ({_listed(steps)}); {new}"
        return (f"resume of step {steps[-1]} from {paths.root}, its newest checkpoint", choices)
    choices = f"resume=latest continues from the newest checkpoint (step {steps[-1]}); {new}"
    return (
        f"resume of step {resume.removeprefix('step:')} from {paths.root}; later steps are undone",
        choices,
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(f"step:{step}" for step in steps)


def with_own_settings(composed: Config, argv: Sequence[str], *, own: Path) -> Config:
    """The run's stored configuration with the overrides of `argv`.

    A section that `argv` replaces as a whole (`task=...`) is taken from `composed`. `scale=PRESET` has no
    effect: the run started with it.
    """
    chosen = {
        section
        for section in GROUPS
        for arg in argv
        if arg.startswith((f"{section}=", f"{section}._target_="))
    }
    replaced = (*(f"{section}{mark}" for section in chosen for mark in "=."), f"{SCALE}=")
    plain = [arg for arg in argv if not arg.startswith(replaced)]
    stored = load_config(["--config", str(own), *plain])
    return dataclasses.replace(
        stored,
        name=composed.name,
        runs_dir=composed.runs_dir,
        **{section: getattr(composed, section) for section in chosen},
    )
