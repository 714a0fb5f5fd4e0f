"""The number of rollout servers that a run on Ray shall have: a file that `areal-like scale` writes and the
driver follows, and the driver's lock, by which others see that it works."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths

MOST = 1000


def directory_of(paths: RunPaths) -> Path:
    """Of the files of a run on Ray."""
    return paths.root / "ray"


def wanted_servers(paths: RunPaths) -> int | None:
    """The number; None if nobody has given one, or the file is not whole yet."""
    try:
        number = int((directory_of(paths) / "servers").read_text())
    except (OSError, ValueError):
        return None
    return number if 1 <= number <= MOST else None


def want_servers(paths: RunPaths, number: int) -> None:
    """Sets the number. Raises ConfigError if no driver runs the run."""
    if not has_driver(paths):
        raise ConfigError(
            f"no driver runs {paths.root} on Ray: continue it with `areal-like submit --ray "
            f"name={paths.root.name}`"
        )
    file = directory_of(paths) / "servers"
    partial = file.with_name(f".servers.{os.getpid()}")
    partial.write_text(f"{number}\n")
    partial.replace(file)


def has_driver(paths: RunPaths) -> bool:
    """True while a driver runs the run."""
    try:
        file = os.open(directory_of(paths) / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


@contextlib.contextmanager
def as_driver(paths: RunPaths) -> Iterator[None]:
    """Holds the lock. Raises ConfigError if another driver does."""
    file = os.open(directory_of(paths) / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(
            f"another `areal-like submit --ray` runs {paths.root}: `areal-like scale` changes the number of "
            "its rollout servers"
        ) from None
    try:
        (directory_of(paths) / "servers").unlink(missing_ok=True)
        yield
    finally:
        os.close(file)
