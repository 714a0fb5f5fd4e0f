"""The state of a run directory: its lock, its checkpoints, and the launcher's order to restart the trainer.

The lock is an flock whose descriptor the daemons inherit. It is held until the last process of the run has
ended, so a second launcher cannot start while the daemons of a killed one still write their checkpoint.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, find_checkpoints
from launch.run_files import read_object

log = logging.getLogger(__name__)

_LOCK = ".lock"


class InUseError(ConfigError):
    """Another launcher, or a daemon that has outlived its launcher, holds the lock of the directory."""


def find_run(name: str) -> Path:
    """The directory of a run, given by its name under runs/ or by its path. Raises ConfigError."""
    root = next((path for path in (Path(name), Path("runs") / name) if _has_config(path)), None)
    if root is None:
        names = [path.parent.name for path in Path("runs").glob("*/config.yaml")]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f": did you mean {near[0]}?" if near else " (neither a run directory nor a name under runs/)"
        raise ConfigError(f"there is no run {name!r}{hint}")
    return root


def _has_config(folder: Path) -> bool:
    """False also for a directory of another user, and for words that no directory can have as its name."""
    try:
        return (folder / "config.yaml").is_file()
    except OSError:
        return False


def newest_checkpoint(word: str, *, verb: str) -> Path | None:
    """The newest checkpoint of the run that a word of the command line names; None if it names no run.

    Raises ConfigError for a run without a checkpoint.
    """
    folder = Path(word).expanduser()
    if not any(map(_has_config, (folder, Path("runs") / word))):
        return None
    found = find_checkpoints(RunPaths(find_run(str(folder)).resolve()).checkpoints)
    if not found:
        raise ConfigError(
            f"{verb} {word}: the run has no checkpoint yet; name a directory of a model, or wait for "
            "trainer.checkpoint_interval steps"
        )
    return found[max(found)]


def restart_order_file(paths: RunPaths, order_id: str) -> Path:
    """The file in which `areal-like restart` writes an order; the launcher reads and removes it.

    Each order has its own, so that commands at the same time do not replace each other's.
    """
    return paths.root / f"restart-{order_id}.json"


def restart_orders(paths: RunPaths) -> list[Path]:
    """The files of all orders, the oldest first."""
    found = []
    for file in paths.root.glob("restart-*.json"):
        with contextlib.suppress(FileNotFoundError):  # its command has removed it
            found.append((file.stat().st_mtime_ns, file))
    return [file for _, file in sorted(found)]


def restart_outcome_file(paths: RunPaths) -> Path:
    """The file in which the launcher reports the outcome of an order with settings; `areal-like restart`
    waits for it."""
    return paths.root / "restart_outcome.json"


@dataclass(frozen=True, kw_only=True)
class RestartOrder:
    """An order to replace a process."""

    role: str
    settings: list[str]
    """`key=value` of the trainer."""
    order_id: str = ""
    """With it, the command that wrote the order finds the outcome."""


def take_restart_order(paths: RunPaths) -> RestartOrder | None:
    """Takes the oldest order; None if there is none, or if it is damaged.

    The file is renamed first: its command may remove it at any moment.
    """
    file = next(iter(restart_orders(paths)), None)
    if file is None:
        return None
    taken = file.with_name(f".{file.name}")
    try:
        file.replace(taken)
    except FileNotFoundError:
        return None
    order = read_object(taken)
    taken.unlink()
    role, settings = order.get("role"), order.get("settings")
    if not isinstance(role, str) or not isinstance(settings, list):
        log.warning("%s was damaged: no process is started again", file)
        return None
    order_id = str(order.get("order_id", ""))
    return RestartOrder(role=role, settings=[str(setting) for setting in settings], order_id=order_id)


def has_launcher(paths: RunPaths) -> bool:
    """True if `areal-like run` has started this run; its processes may have ended."""
    return (paths.root / _LOCK).exists()


def is_over(paths: RunPaths) -> bool:
    """True when no process of a launched run holds the directory.

    A job whose roles were started by hand has no lock file and never counts as over.
    """
    return is_held(paths) is False


def is_held(paths: RunPaths) -> bool | None:
    """True when a process of a launched run holds the directory; None without a lock file."""
    try:
        return is_locked(paths.root / _LOCK)
    except OSError:  # the file system has no locks
        return True


def is_locked(file: Path) -> bool | None:
    """True while a process holds the lock of this file; None if there is no such file. Raises OSError."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def release_for_others(paths: RunPaths) -> None:
    """Prepares the directory for roles that are started without a launcher, even if a launcher started the
    run.

    Without a lock file the run does not count as over. Raises InUseError if a launcher runs it.
    """
    if paths.root.is_dir():
        os.close(lock(paths))
        (paths.root / _LOCK).unlink(missing_ok=True)


def holds_run(paths: RunPaths) -> bool:
    """True when a step was trained here. A job that failed before its first step leaves its name free."""
    return paths.summary.exists() or _has_steps(paths)


def _has_steps(paths: RunPaths) -> bool:
    return bool(checkpoints(paths)) or (paths.metrics.exists() and paths.metrics.stat().st_size > 0)


def is_trained(paths: RunPaths, *, num_steps: int) -> bool:
    """True when the run ended with all of its steps trained, saved and summarized."""
    return is_summarized(paths) and max(checkpoints(paths), default=0) >= num_steps


def is_summarized(paths: RunPaths) -> bool:
    """True when there is a summary of a finished run or evaluation."""
    return bool(read_object(paths.summary).get("finished"))


def checkpoints(paths: RunPaths) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return list(find_checkpoints(paths.checkpoints))


def remove_unbegun(paths: RunPaths) -> None:
    """Removes the directory of a job that was refused, if it holds only what a run writes there.

    The caller holds the lock, and this launch has created the directory.
    """
    ours = {*paths.named, paths.root / _LOCK, restart_outcome_file(paths), *paths.root.glob("ledger*")}
    if not _has_steps(paths) and ours.issuperset(paths.root.iterdir()):
        remove_ledgers(paths)
        shutil.rmtree(paths.root)


def remove_ledgers(paths: RunPaths) -> None:
    """Removes the run's ledgers, also those on another disk (`buffer.ledger_dir`)."""
    for ledger in paths.ledger_places:
        is_link = ledger.is_symlink()
        if not is_link or (ledger / "ledger.sqlite3").exists():
            shutil.rmtree(ledger.resolve())
        if is_link:
            ledger.unlink()


def lock(paths: RunPaths) -> int:
    """Creates the directory if necessary and takes its lock; returns the lock's file descriptor.

    Raises InUseError when another process holds it, ConfigError when the directory cannot be created.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        lock_fd = os.open(paths.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot create the run directory {paths.root}: {error.strerror}; choose another runs_dir=..."
        ) from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock_fd, 32).decode(errors="replace").strip() or "?"
        os.close(lock_fd)
        raise InUseError(
            f"{paths.root} is in use by the run that process {holder} started: "
            "wait for its end, or choose another name=..."
        ) from None
    except OSError as error:
        os.close(lock_fd)
        raise ConfigError(
            f"the file system of {paths.root} has no locks ({error.strerror}): "
            "choose a runs_dir=... that has (Lustre: mounted with `flock`)"
        ) from None
    with contextlib.suppress(OSError):  # the disk is full: only the message above has no number then
        os.truncate(lock_fd, 0)
        os.write(lock_fd, f"{os.getpid()}\n".encode())
    return lock_fd
