"""Which directory a job runs in, and that nobody else does.

A run directory belongs to one run for ever: a finished or unfinished run is never written over. A new job therefore needs a free
name (an unnamed one is numbered: default, default-2, ...), or it goes on with what is there (`resume=latest`). Going on starts from the
run's own configuration, not from the defaults, so a forgotten override cannot change a run in its middle.

The lock is an flock whose descriptor the daemons inherit: it is held until the last process of the run has ended, so a launcher
that was killed does not make room for a second one while its daemons still write their checkpoint.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import BUILT_MODELS, RunPaths, find_checkpoints
from areal_like.runtime.command_line import GROUPS, load_config, save_config


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run directory that this process holds."""

    config: Config
    paths: RunPaths
    lock_fd: int
    """The lock; pass it to every child."""

    def close(self) -> None:
        """Lets go of the directory (the children that inherited the lock still hold it)."""
        os.close(self.lock_fd)


def open_run(argv: Sequence[str]) -> OpenRun:
    """Resolves a command line, takes its run directory and writes `config.yaml` there.

    Raises ConfigError: a wrong setting, a directory that is in use or holds another run, nothing to resume from.
    """
    config = load_config(argv)
    is_named = any(arg.startswith("name=") or arg == "--config" for arg in argv)
    return _prepared(_resume(config, argv) if config.resume else _start(config, is_named=is_named))


def open_replay(recorded: Path, argv: Sequence[str]) -> OpenRun:
    """A new run with the settings of the recorded one and this command line's overrides. Raises ConfigError as `open_run`."""
    config = _with_own_settings(load_config(argv), argv, own=recorded / "config.yaml")
    is_named = any(arg.startswith("name=") for arg in argv)
    if config.model.path in BUILT_MODELS:
        built = str(RunPaths(recorded.resolve()).built_model)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=built))
    runs_dir = (
        config.runs_dir
        if any(arg.startswith("runs_dir=") for arg in argv)
        else str(recorded.resolve().parent)
    )
    name = config.name if is_named else f"{recorded.resolve().name}-replay"
    return _prepared(
        _start(dataclasses.replace(config, name=name, runs_dir=runs_dir, resume=""), is_named=is_named)
    )


def _prepared(run: OpenRun) -> OpenRun:
    try:
        for stale in run.paths.endpoints.glob("*.json"):
            stale.unlink()
        order_file(run.paths).unlink(missing_ok=True)  # an order to an earlier launcher
        for folder in (run.paths.endpoints, run.paths.logs):
            folder.mkdir(exist_ok=True)
        save_config(run.config, run.paths.config)
    except OSError as error:
        run.close()
        raise ConfigError(f"cannot write to {run.paths.root}: {error.strerror}") from None
    return run


def _start(config: Config, *, is_named: bool) -> OpenRun:
    for number in itertools.count(1):
        candidate = config if number == 1 else dataclasses.replace(config, name=f"{config.name}-{number}")
        paths = RunPaths.of(candidate)
        if not is_named and holds_run(paths):
            continue
        try:
            lock_fd = _lock(paths)
        except _InUseError:
            if is_named:
                raise
            continue
        if not holds_run(paths):
            for ledger in (
                paths.ledgers
            ):  # of a job that failed before its first step: its tickets are none of this one's
                shutil.rmtree(ledger)
            return OpenRun(config=candidate, paths=paths, lock_fd=lock_fd)
        os.close(lock_fd)
        if is_named:
            kind = "a finished" if paths.summary.exists() else "an unfinished"
            can_resume = bool(checkpoints(paths) or paths.ledgers)
            way_on = (
                "go on with resume=latest"
                if can_resume
                else "remove that directory (it has no checkpoint to resume from)"
            )
            raise ConfigError(f"{paths.root} already holds {kind} run: choose another name=..., or {way_on}")
    raise AssertionError("itertools.count ended")


def _resume(config: Config, argv: Sequence[str]) -> OpenRun:
    paths = RunPaths.of(config)
    if not paths.config.is_file():
        raise ConfigError(
            f"resume={config.resume}: there is no run in {paths.root}; name=... chooses the run"
        )
    lock_fd = _lock(paths)
    try:
        steps = checkpoints(paths)
        begins_again = config.resume == "latest" and not steps and bool(paths.ledgers)
        if not steps and not begins_again:
            raise ConfigError(
                f"resume={config.resume}: {paths.checkpoints} holds no checkpoint; start again under another name=..."
            )
        if config.resume.startswith("step:") and int(config.resume.removeprefix("step:")) not in steps:
            raise ConfigError(
                f"resume={config.resume}: the checkpoints kept are {', '.join(f'step:{step}' for step in steps)}"
            )
        if "--config" not in argv:
            config = _with_own_settings(config, argv, own=paths.config)
        if (
            begins_again
        ):  # it died before its first checkpoint: from step 0, on the groups that its ledger holds
            config = dataclasses.replace(config, resume="")
    except ConfigError:
        os.close(lock_fd)
        raise
    return OpenRun(config=config, paths=paths, lock_fd=lock_fd)


def _with_own_settings(composed: Config, argv: Sequence[str], *, own: Path) -> Config:
    """The run's own configuration with this command line's overrides. A section chosen anew (`task=...`) is taken as composed."""
    chosen = {
        section
        for section in GROUPS
        for arg in argv
        if arg.startswith((f"{section}=", f"{section}._target_="))
    }
    plain = [arg for arg in argv if not arg.startswith(tuple(f"{s}{mark}" for s in chosen for mark in "=."))]
    stored = load_config(["--config", str(own), *plain])
    return dataclasses.replace(
        stored,
        name=composed.name,
        runs_dir=composed.runs_dir,
        **{section: getattr(composed, section) for section in chosen},
    )


def find_run(name: str) -> Path:
    """The directory of a run by its name under runs/ or its path. Raises ConfigError when there is none."""
    root = next(
        (path for path in (Path(name), Path("runs") / name) if (path / "config.yaml").is_file()), None
    )
    if root is None:
        raise ConfigError(f"there is no run {name!r} (neither a run directory nor a name under runs/)")
    return root


def order_file(paths: RunPaths) -> Path:
    """Where `areal-like restart` leaves its order for the launcher, who removes it when taking it."""
    return paths.root / "restart.json"


def take_order(paths: RunPaths) -> list[str] | None:
    """The settings of an order to replace the trainer; None when there is none."""
    try:
        order = json.loads(order_file(paths).read_text())
    except FileNotFoundError:
        return None
    order_file(paths).unlink()
    return [str(setting) for setting in order["settings"]]


def is_over(paths: RunPaths) -> bool:
    """Whether no process of a launched run holds its directory. A job whose roles were started by hand has no lock, and is never over."""
    try:
        lock = os.open(paths.root / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def holds_run(paths: RunPaths) -> bool:
    """Whether training ever began here. A job that failed before its first step leaves its name free."""
    trained = paths.metrics.exists() and paths.metrics.stat().st_size > 0
    return trained or paths.summary.exists() or bool(checkpoints(paths))


def checkpoints(paths: RunPaths) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return list(find_checkpoints(paths.checkpoints))


class _InUseError(ConfigError):
    """Another launcher, or daemons that it left, hold the directory."""


def _lock(paths: RunPaths) -> int:
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(paths.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {paths.root}: {error.strerror}; choose another runs_dir=..."
        ) from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock_fd, 32).decode(errors="replace").strip() or "?"
        os.close(lock_fd)
        raise _InUseError(
            f"{paths.root} is in use by the run that process {holder} started: wait for its end, or choose another name=..."
        ) from None
    os.truncate(lock_fd, 0)
    os.write(lock_fd, f"{os.getpid()}\n".encode())
    return lock_fd
