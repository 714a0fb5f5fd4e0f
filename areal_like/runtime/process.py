"""Makes a process end when its parent ends, and keeps its files private.

The processes of the launcher call `die_with_launcher` first, which does nothing if something else started
them. The processes that these start call `die_with_parent`; external programs do so through `tied_exec`.

A daemon that outlives its launcher keeps a port, a core and perhaps a GPU without being noticed. The kernel
can end it (PR_SET_PDEATHSIG), even if the parent was killed by SIGKILL and could not signal its children.
Linux only: on other systems this does nothing, and a parent killed by SIGKILL leaves its children running.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MAX_FILES = 1 << 20
_parent_pid = 0
"""The parent of this process at the call of `die_with_parent`; 0 before that."""


def die_with_parent(*, signum: int = signal.SIGTERM) -> None:
    """Makes the kernel send `signum` to this process when its parent ends. Call it first, in the main thread.

    The kernel sends it when the parent's *thread* that started this process ends, so a parent must start its
    children from a thread that runs as long as the parent. Exits with status 1 if the parent is already gone.
    """
    if sys.platform != "linux":
        return
    parent_pid = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signum, name="PR_SET_PDEATHSIG")
    global _parent_pid
    _parent_pid = parent_pid
    # The parent may have ended before the call above. Then the kernel never sends the signal.
    if os.getppid() != parent_pid:
        raise SystemExit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent has ended, so that it can end them.

    Linux only: on other systems this does nothing, and they become children of process 1.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, name="PR_SET_CHILD_SUBREAPER")


def parent_is_gone() -> bool:
    """True if the parent of `die_with_parent` has ended: its signal then came from the kernel."""
    return _parent_pid not in (0, os.getppid())


def exit_at_once(code: int) -> NoReturn:
    """Ends this process without joining its threads, one of which may hang in a user's reward or in torch."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


PARENT_PID = "AREAL_LIKE_PARENT_PID"
"""Environment variable with the launcher's pid, set for the children whose life is tied to it."""


def die_with_launcher() -> None:
    """Calls `die_with_parent` if the launcher started this daemon; a daemon started by hand may outlive its
    shell."""
    launcher_pid = os.environ.pop(PARENT_PID, "")
    if launcher_pid:
        die_with_parent()
        if os.getppid() != int(launcher_pid):
            raise SystemExit(1)


def keep_files_private(root: Path | None = None) -> None:
    """Makes all files that this process creates readable by its user only (0600, directories 0700).

    `root`: a run's directory. Its directories get these modes too, if an earlier release made them.
    """
    os.umask(0o077)
    if root is not None and root.is_dir():
        for folder in (Path(path) for path, _, _ in os.walk(root)):
            # It belongs to another user, or has been deleted meanwhile.
            with contextlib.suppress(OSError):
                if folder.stat().st_mode & 0o077:
                    folder.chmod(0o700)


def allow_many_files() -> None:
    """Raises this process's limit of open files (sockets included) as far as the system allows.

    libzmq accepts every connection. At the usual limit of 1024, a few hundred idle connections would keep
    the daemon from opening its own files.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if most == resource.RLIM_INFINITY else min(most, _MAX_FILES)
    # Some systems refuse values below their "hard" limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def early_signals(drain_code: int = 128 + signal.SIGTERM) -> None:
    """Handles signals until the daemon does so itself: its imports take seconds, and it has nothing to lose
    yet.

    SIGTERM ends the process with `drain_code`, by default a shell's code for it: 0, before the settings are
    read, could mean that the run is finished. SIGHUP and SIGUSR1 do nothing.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(drain_code))
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _prctl(option: int, value: int, *, name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({name}): {os.strerror(errno)}")
