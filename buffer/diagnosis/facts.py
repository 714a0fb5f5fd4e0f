"""The facts about a running job from which the buffer derives who waits on whom, and their report. No rules.

Everything comes from the ledger and from the last heartbeat of each peer, so one response of the buffer is
enough, no matter which machines the peers run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class PeerFacts:
    """One registered daemon."""

    name: str
    silent_s: float
    """Seconds since its last message. Time in which the buffer itself did not run does not count."""
    state: str
    waits: Mapping[str, float] = field(default_factory=dict)
    """Name of a wait -> seconds, as of its last heartbeat."""
    stats: Mapping[str, float] = field(default_factory=dict)

    def longest_wait(self, prefix: str) -> tuple[str, float]:
        """Its longest wait whose name begins with `prefix:`: the name without the prefix, and the seconds;
        ("", 0): none."""
        found = self.names_of(prefix)
        return max(found.items(), key=lambda wait: wait[1], default=("", 0.0))

    def names_of(self, prefix: str) -> dict[str, float]:
        """The names of its waits that begin with `prefix:`, without the prefix."""
        begin = f"{prefix}: "
        return {name.removeprefix(begin): s for name, s in self.waits.items() if name.startswith(begin)}


@dataclass(frozen=True, kw_only=True)
class ServerFacts(PeerFacts):
    """One rollout server."""

    held_back: str = ""
    """Why the buffer grants it no leases (a quarantine, or an operator); empty if it grants leases."""
    lies: str = ""
    """Why it is in quarantine, if the reason is messages that no server sends."""


@dataclass(frozen=True, kw_only=True)
class LeaseFacts:
    """A ticket whose samples a server is generating."""

    ticket_id: int
    server: str
    age_s: float
    is_due: bool = False
    """True: no step after the open one may train on its group."""
    is_late: bool = False
    """True: its group is closed (`buffer.overdue=close`)."""

    def __str__(self) -> str:
        return f"{'late samples of ' * self.is_late}ticket {self.ticket_id} at {self.server}"


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """The job at one moment."""

    servers: tuple[ServerFacts, ...] = ()
    ranks: tuple[PeerFacts, ...] = ()
    world_size: int = 0
    """Number of ranks of the trainer, as the ranks report it; 0 before the first registers."""
    open_step: int = 0
    """The step being recorded."""
    num_recorded: int = 0
    """Positions recorded in it, each with a group or, with `buffer.overdue=close`, with parts."""
    num_groups: int = 0
    """Positions of a step."""
    group_size: int = 1
    """Samples of a position."""
    overdue: str = "wait"
    """The resolved `buffer.overdue`."""
    contradicts_close: str = ""
    """The setting that contradicts `buffer.overdue=close`; empty: none does."""
    close_after: int = 0
    """With `buffer.overdue=close`: the resolved `staleness.close_after`."""
    num_ready: int = 0
    """Complete groups that are not recorded."""
    num_parts: int = 0
    """Complete samples of closed groups that are not recorded."""
    trainer_step: int = 0
    """Steps that the trainer has completed."""
    oldest_leases: tuple[LeaseFacts, ...] = ()
    """Leases of training tickets, the oldest first."""
    lost_servers: Mapping[str, float] = field(default_factory=dict)
    """Servers that stopped responding and were removed -> seconds since then."""
    store_trouble: str = ""
    store_trouble_s: float = 0.0
    paused_s: float = 0.0
    """Seconds since an operator paused the run; 0: it is not paused."""
    closed_s: float = 0.0
    """Seconds since admission was closed, for lack of a trainer; 0: it is open."""
    is_finished: bool = False
    loop_late_s: float = 0.0
    """Mean delay of the buffer's own timer over the last seconds."""

    @property
    def num_missing(self) -> int:
        """Groups that the trainer's step still needs; 0 if all of its groups are recorded."""
        return self.num_groups - self.num_recorded if self.open_step <= self.trainer_step else 0

    @property
    def is_reserving(self) -> bool:
        """True if complete groups cannot be recorded in the trainer's step because its free positions are
        reserved for running groups that are due in it."""
        return self.overdue == "wait" and self.num_missing > 0 and self.num_ready > 0

    @property
    def steps_complete(self) -> float:
        """The steps that the complete samples would fill that are not recorded."""
        num_samples = self.num_ready * self.group_size + self.num_parts
        return num_samples / max(1, self.num_groups * self.group_size)


class On(StrEnum):
    """The kinds of things that a job waits for."""

    TRAINER = "trainer"
    SERVER = "rollout_server"
    ENGINE = "engine"
    REWARD = "reward"
    TEACHER = "teacher"
    """The servers of a teacher (`distill.teachers`)."""
    ENVIRONMENT = "environment"
    AGENT = "agent"
    """External agents, or the task's `agent()`."""
    WEIGHTS = "weights"
    """A push of weights."""
    BUFFER = "buffer"
    OPERATOR = "operator"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One daemon, or part of one, on which others wait."""

    on: On
    name: str
    """`rollout-1`, `rollout-1's engine`, `trainer-0`, ..."""
    seconds: float
    what: str
    """`no token for 28 s`"""
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """Seconds after which a wait is reported."""

    stall_s: float
    """For peers that respond or make progress several times within this time when they work."""
    work_s: float
    """For work whose time depends on the job: rewards, tools, a push, an optimizer step."""

    @classmethod
    def of(cls, *, heartbeat_s: float) -> WaitLimits:
        """Limits for a given heartbeat interval."""
        return cls(stall_s=max(5.0, 6 * heartbeat_s), work_s=max(10.0, 12 * heartbeat_s))
