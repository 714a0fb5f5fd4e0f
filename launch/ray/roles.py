"""Decides which roles of a run are restarted, and when. Pure: no Ray, no clock.

    WAITING --begin()--> RUNNING --ended(code)--> over, or WAITING again

A role is the buffer, the whole trainer (its nodes start and stop together), or one rollout server, score
server or router. It ends by:

    0      the run is finished              over
    75     drained                          over; if the run needs one and it was the last, the run drains
    2      a wrong setting                  over, and the run with it
    None   its node or its actor is lost    restarted
    else   a failure                        restarted; after `max_failures` in a row it is over, and the
                                            run with it unless it is a rollout server
"""

from __future__ import annotations

from dataclasses import dataclass, field

from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState
from launch.local_job.specs import DRAINED

HEALTHY_S = 600.0
"""Uptime in seconds after which a role's earlier failures no longer count."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_SHOWN = {"rollout": "rollout server", "scorer": "score server", "router": "router"}
"""Roles of which a run may have several, as messages name them."""


@dataclass(kw_only=True, eq=False)
class RoleState:
    """One role, compared by identity. `now_s`: seconds on any monotonic clock."""

    role: str
    """`buffer` | `trainer` | `rollout` | `scorer` | `router`"""
    number: int = 0
    """Among those of its role."""
    num_starts: int = 0
    restarts: Restarts
    is_over: bool = False

    @property
    def name(self) -> str:
        """The role as messages name it."""
        return f"the {self.role}" if self.is_single else f"{_SHOWN[self.role]} {self.number}"

    @property
    def is_single(self) -> bool:
        """True for the roles of which a run has one: buffer and trainer."""
        return self.role not in _SHOWN

    def begin(self, *, now_s: float) -> None:
        """Records that it is started now."""
        self.num_starts += 1
        self.restarts.started(now_s=now_s)


@dataclass(kw_only=True)
class Supervision:
    """The roles of one run."""

    max_failures: int
    """Failures in a row after which a role is given up."""
    roles: list[RoleState] = field(default_factory=list)
    is_stopping: bool = False
    """True: the run drains, and no role is started any more."""
    is_finished: bool = False
    """True: the run is finished, and no role is started any more."""
    exit_code: int = 0

    @property
    def is_over(self) -> bool:
        """True when no role runs or will run again."""
        return all(role.is_over for role in self.roles)

    def add(self, role: str, *, now_s: float) -> RoleState:
        """Adds a role, which is due at once."""
        numbers = [each.number for each in self.roles if each.role == role]
        limits = RestartLimits(
            max_failures=self.max_failures,
            healthy_s=HEALTHY_S,
            first_pause_s=_FIRST_PAUSE_S,
            longest_pause_s=_LONGEST_PAUSE_S,
        )
        number = max(numbers, default=-1) + 1
        added = RoleState(role=role, number=number, restarts=Restarts(limits, now_s=now_s))
        self.roles.append(added)
        return added

    def servers(self) -> list[RoleState]:
        """The rollout servers that are not over, oldest first."""
        return [role for role in self.roles if role.role == "rollout" and not role.is_over]

    def _was_last(self, role: RoleState) -> bool:
        """True if the run needs a role of this kind, and this one that has ended was the last."""
        return role.role != "rollout" and all(
            other.is_over for other in self.roles if other.role == role.role
        )

    def ended(self, role: RoleState, code: int | None, *, now_s: float) -> str:
        """Decides what to do about a role that has ended; returns a line for the user."""
        if self.is_stopping or self.is_finished or code in (0, DRAINED):
            role.is_over = True
            self.is_finished |= code == 0
            # Without it the others would wait forever; `scale` adds rollout servers.
            self.is_stopping |= code == DRAINED and not self.is_finished and self._was_last(role)
            return f"{role.name} has ended: {_meaning(code)}"
        restarts = role.restarts
        if code is None:
            restarts.left(now_s=now_s, pause_s=_FIRST_PAUSE_S)
            return f"{role.name} is lost with its node or actor; it is restarted"
        restarts.failed(now_s=now_s)
        if code != 2 and restarts.state is not RestartState.GIVEN_UP:
            return (
                f"{role.name} failed (exit code {code}, failure {restarts.num_failures} of "
                f"{self.max_failures}); it is restarted in {restarts.due_s - now_s:.0f} s"
            )
        role.is_over = True
        if role.role == "rollout" and code != 2:
            return f"{role.name} failed {restarts.num_failures} times in a row and is given up"
        self.exit_code = code
        self.is_stopping = True
        return f"{role.name} ended with exit code {code}: the run ends"


def _meaning(code: int | None) -> str:
    meanings = {0: "the run is finished", DRAINED: "drained", None: "lost"}
    return meanings.get(code, f"exit code {code}")
