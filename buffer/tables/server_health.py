"""The failures of one rollout server in a row, and its quarantine: no leases for a while.

    HEALTHY -> too many failures in a row -> QUARANTINED -> back-off is over -> ON_PROBATION
                                                  ^                               |     |
                                                  +-------- the next failure -----+     |
    HEALTHY <------------------------- an accepted sample ------------------------------+

The back-off doubles with each quarantine in a row. A row counts tickets, not samples: the samples of a group
often fail for one cause. Failures of the server (its engine) and of the task's code (reward, environment) are
separate rows, because they have different causes.

Not stored: a restart of the buffer is a retry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from areal_like.failures import FAULTS_OF_SERVER, FailureKind

FIRST_BACKOFF_S = 30.0
LONGEST_BACKOFF_S = 1920.0
MAX_QUARANTINES = 3
"""Quarantines in a row for failures of its engine after which a server counts as broken for good. One is
enough for failures of the task's code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Why a server gets no leases, and until when."""

    reason: str
    until_s: float


@dataclass(kw_only=True, slots=True, eq=False)
class ServerHealth:
    """Outcomes of one server process. `now_s`: the clock of its heartbeats."""

    quarantine: Quarantine | None = None
    has_outcome: bool = False
    """True once it has delivered a sample, or failed one by its own or the task's fault."""
    num_quarantines: int = 0
    """Since its last accepted sample."""
    has_failed_task: bool = False
    """True if a quarantine since its last accepted sample was for failures of the task's code."""
    _rows: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    """Fault of the server (else of the task) -> tickets of which samples failed, since the last success."""

    @property
    def is_broken(self) -> bool:
        """True if more waiting is unlikely to help."""
        return self.has_failed_task or self.num_quarantines >= MAX_QUARANTINES

    def succeed(self) -> None:
        """It delivered a sample that was accepted: the server is healthy."""
        self.has_outcome = True
        if self.num_quarantines or self._rows[True] or self._rows[False]:
            self.quarantine, self.num_quarantines, self.has_failed_task = None, 0, False
            self._rows = {True: set(), False: set()}

    def succeed_without_reward(self) -> None:
        """It delivered tokens that are trained on with reward 0: its engine works, the task may not."""
        self.has_outcome = True
        self._rows[True].clear()

    def fail(self, ticket_id: int, kind: FailureKind, error: str, *, limit: int, now_s: float) -> bool:
        """Counts a failure of a server that is not in quarantine. True if it begins one.

        `limit`: tickets in a row that begin a quarantine.
        """
        self.has_outcome = True
        is_server_fault = kind in FAULTS_OF_SERVER
        row = self._rows[is_server_fault]
        if len(row) < limit:
            row.add(ticket_id)
        if len(row) < limit:
            return False
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**self.num_quarantines)
        self.num_quarantines += 1
        self.has_failed_task |= not is_server_fault
        reason = f"{len(row)} samples failed in a row, all of different tickets; the last: {error}"
        self.quarantine = Quarantine(reason=reason, until_s=now_s + backoff_s)
        return True

    def end_backoff(self, *, now_s: float) -> None:
        """Ends a quarantine whose time is over; the next failure begins a longer one."""
        if self.quarantine is not None and self.quarantine.until_s <= now_s:
            self.quarantine = None
