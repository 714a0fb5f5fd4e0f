"""Tracks the servers of one role in a local job: when to restart one, and when none is left.

Pure: no processes, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState
from launch.local_job.actions import Exit
from launch.local_job.specs import DRAINED
from launch.observation.observer import Observation


class SupervisedServers:
    """Rollout servers or score servers: those that the launcher has started ("ours"), and those that users
    have joined to the job.

    Our server: running -> dead -> restarted -> running
                                -> too many deaths in a row: not restarted
                        -> drained (stopped by a user), or exit code 0 (the run is finished): not restarted
                -> asked to end for its replacement -> drained -> restarted
    not restarted -> a user orders its restart -> running
    Joined server: observed only; the job is not over while one is left.
    """

    def __init__(
        self, names: Sequence[str], *, now_s: float, lease_timeout_s: float, role: str = "rollout"
    ) -> None:
        self._role = role
        self._ours = frozenset(names)
        self._lease_timeout_s = lease_timeout_s
        self._restarts = {name: Restarts(RestartLimits(), now_s=now_s) for name in names}
        """Server name -> its restarts, without servers that a user stopped or that have left the finished
        run."""
        self._replacing: set[str] = set()
        """Servers that were asked to end for their replacement."""
        self._last_exit: Exit | None = None
        self._joined_seen_s = -math.inf
        """Time at which a joined server was last seen while none of ours was left."""

    def __contains__(self, name: str) -> bool:
        return name in self._restarts

    def replace(self, name: str, *, is_running: bool, now_s: float) -> bool:
        """Records that a server is asked to end for its replacement or, if it does not run, is due now.

        Returns False if it is not ours.
        """
        if name in self._ours and is_running:
            self._replacing.add(name)
        elif name in self._ours:
            self._restarts[name] = Restarts(RestartLimits(), now_s=now_s)
        return name in self._ours

    @property
    def ours(self) -> list[str]:
        """Our servers, dead ones included, without those that were stopped or have left."""
        return list(self._restarts)

    @property
    def expected(self) -> list[str]:
        """Our servers that run or will run again."""
        given_up = RestartState.GIVEN_UP
        return [name for name, restarts in self._restarts.items() if restarts.state is not given_up]

    def exited(self, ended: Exit, *, now_s: float) -> str:
        """Records the end of one of our servers; returns the notice for the user."""
        restarts, is_replaced = self._restarts[ended.name], ended.name in self._replacing
        self._replacing.discard(ended.name)
        if ended.code == DRAINED and is_replaced:
            restarts.left(now_s=now_s)
            return f"{ended.name} has left: starting it again"
        self._last_exit = ended
        if ended.code in (0, DRAINED):
            del self._restarts[ended.name]
            return f"{ended.name} " + ("was stopped by a user" if ended.code else "has left the finished run")
        restarts.failed(now_s=now_s)
        if restarts.state is RestartState.GIVEN_UP:
            return f"{ended.name} ended {restarts.num_failures} times in a row: not starting it again"
        return ended.restart_notice(restarts.due_s - now_s)

    def start_due(self, *, now_s: float) -> list[str]:
        """Returns the servers to start now, for the first time or again, and marks them as started."""
        due = [name for name, restarts in self._restarts.items() if restarts.is_due(now_s=now_s)]
        for name in due:
            self._restarts[name].started(now_s=now_s)
        return due

    def last_exit_if_none_left(self, seen: Observation, *, now_s: float) -> Exit | None:
        """The exit of our last server once no server is left, ours or joined; None before.

        Must be polled, because a joined server may be the last to leave. The result stays None for one lease
        timeout after that, because joined servers need time to register with a restarted buffer.
        """
        if self._last_exit is None or self.expected:
            return None
        if self._sees_joined_server(seen):
            self._joined_seen_s = now_s
        return None if now_s - self._joined_seen_s < self._lease_timeout_s else self._last_exit

    def _sees_joined_server(self, seen: Observation) -> bool:
        """True if a joined server responds or is registered with the buffer.

        A server on a machine that cannot see the run's directory is only visible at the buffer.
        """
        answering = [
            view.name for view in seen.daemons.values() if view.role == self._role and view.status is not None
        ]
        peers = seen.buffer.get("peers", [])
        registered = [str(peer["name"]) for peer in peers if peer.get("role") == self._role]
        return any(name not in self._ours for name in answering + registered)
