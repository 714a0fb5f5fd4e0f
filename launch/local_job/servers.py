"""The rollout servers of a local job: their restarts, and the question whether any server is left. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launch.local_job.actions import Exit
from launch.local_job.restarts import Restarts, RestartState
from launch.observation.observer import Observation


class RolloutServers:
    """The servers that the launcher has started, and those that joined the job by themselves (guests).

    One of ours: running -> dead -> started again, or given up after too many deaths, or gone for good when
    it ended with exit code 0 because a user stopped it.
    """

    def __init__(self, names: Sequence[str], *, now_s: float, lease_timeout_s: float) -> None:
        self._ours = frozenset(names)
        self._lease_timeout_s = lease_timeout_s
        self._restarts = {name: Restarts(now_s=now_s) for name in names}
        """Dead servers included, those that ended with code 0 excluded."""
        self._last_exit: Exit | None = None
        self._guests_seen_s = -math.inf
        """When a guest was last seen while none of ours was left."""

    def __contains__(self, name: str) -> bool:
        return name in self._restarts

    @property
    def ours(self) -> list[str]:
        """Our servers, dead ones included."""
        return list(self._restarts)

    @property
    def expected(self) -> list[str]:
        """Our servers that run or will run again."""
        given_up = RestartState.GIVEN_UP
        return [name for name, restarts in self._restarts.items() if restarts.state is not given_up]

    def exited(self, exit: Exit, *, now_s: float) -> str:
        """Notes the end of one of our servers; returns the notice for the user."""
        self._last_exit = exit
        if exit.code == 0:
            del self._restarts[exit.name]
            return f"{exit.name} was asked to stop"
        restarts = self._restarts[exit.name]
        restarts.died(now_s=now_s)
        if restarts.state is RestartState.GIVEN_UP:
            return f"{exit.name} ended {restarts.num_quick_deaths} times in a row: given up"
        delay_s = restarts.due_s - now_s
        return f"{exit.name} ended ({exit.description}): starting it again in {delay_s:.1f} s"

    def restart_due(self, *, now_s: float) -> list[str]:
        """Servers to start again now; they count as started."""
        due = [name for name, restarts in self._restarts.items() if restarts.is_due(now_s=now_s)]
        for name in due:
            self._restarts[name].started(now_s=now_s)
        return due

    def last_exit_if_none_left(self, seen: Observation, *, now_s: float) -> Exit | None:
        """The exit of our last server, once no server is left, ours or guest; None before.

        Has to be polled, because a guest may be the last to leave. A lease timeout passes first: a buffer
        that was started again needs some time until the guests have registered with it.
        """
        if self._last_exit is None or self.expected:
            return None
        if self._has_guests(seen):
            self._guests_seen_s = now_s
        return None if now_s - self._guests_seen_s < self._lease_timeout_s else self._last_exit

    def _has_guests(self, seen: Observation) -> bool:
        """A guest answers, or is registered with the buffer: it may be on a machine that cannot see the run's
        directory."""
        answering = [
            view.name for view in seen.daemons.values() if view.role == "rollout" and view.status is not None
        ]
        peers = seen.buffer.get("peers", [])
        registered = [str(peer["name"]) for peer in peers if peer.get("role") == "rollout"]
        return any(name not in self._ours for name in answering + registered)
