"""The process table of a local job: starts, ends and reaps its child processes."""

from __future__ import annotations

import logging
import os
import time

from areal_like.paths import RunPaths
from launch.local_job.actions import Exit, describe_exit
from launch.local_job.child import Child, kill_marked
from launch.local_job.specs import ChildSpec

log = logging.getLogger(__name__)


class ProcessTable:
    """The children of one run that have been started and not yet reaped. `lock_fd`: the run's lock.

    Use it from the main thread only: the kernel ends a child when the thread that started it ends.
    """

    def __init__(self, paths: RunPaths, *, lock_fd: int) -> None:
        self._paths, self._lock_fd = paths, lock_fd
        self._marker = f"{paths.root}:{os.getpid()}:{time.time_ns()}"
        self._children: dict[str, Child] = {}

    @property
    def names(self) -> list[str]:
        """Names of the children that are not reaped yet."""
        return list(self._children)

    def start(self, spec: ChildSpec) -> None:
        """Starts a child."""
        child = Child(spec, paths=self._paths, marker=self._marker, lock_fd=self._lock_fd)
        log.info("%s started, pid %d", spec.name, child.pid)
        self._children[spec.name] = child

    def reap(self, name: str) -> Exit | None:
        """Removes a child that has ended and kills the rest of its process group; None while it runs."""
        child = self._children.get(name)
        code = child.exit_code() if child else None
        if child is None or code is None:
            return None
        del self._children[name]
        child.kill()
        (self._paths.endpoints / f"{name}.json").unlink(missing_ok=True)
        log.info("%s ended: %s", name, describe_exit(code))
        complaint = child.complaint() if code == 2 else ""
        return Exit(name=name, code=code, complaint=complaint, last_words=tuple(child.last_words()))

    def terminate(self, name: str) -> None:
        """Sends a child its stop signal."""
        self._children[name].terminate()

    def kill(self, name: str) -> None:
        """Kills a child and its process group at once."""
        self._children.pop(name).kill()

    def kill_everything(self) -> None:
        """Kills every process of the run at once, also processes that have started a new session."""
        for child in self._children.values():
            child.kill()
        kill_marked(self._marker)
        self._children.clear()

    def last_line(self, name: str) -> str:
        """The newest line of a child's output; empty when it does not run."""
        child = self._children.get(name)
        return child.last_line() if child else ""

    def last_words(self, name: str) -> list[str]:
        """The last lines of a child's output and traceback; empty when it does not run."""
        child = self._children.get(name)
        return child.last_words() if child else []
