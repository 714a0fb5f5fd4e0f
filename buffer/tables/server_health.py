"""Consecutive failures of one rollout server, and its quarantine: no leases for a while.

    HEALTHY -> too many failures in a row -> QUARANTINED -> back-off is over -> ON_PROBATION
                                                  ^                               |     |
                                                  +-------- the next failure -----+     |
    HEALTHY <------------------------- an accepted sample ------------------------------+

The back-off doubles with each quarantine in a row. Tickets are counted, not samples: the samples of a group
often fail for the same cause. Failures of the server (its engine) and of the task's code (reward,
environment) are counted separately, because they have different causes.

A lie is a message that no server of this release sends: a record or a total with an absurd number, a frame
that cannot be decoded. Accepted samples do not make up for lies:

    HEALTHY -> every `LIES_PER_QUARANTINE` lies -> QUARANTINED -> ... -> `MAX_LIES` -> REFUSED

Not stored: a restart of the buffer is a retry.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from areal_like.failures import FAULTS_OF_SERVER, FailureKind

FIRST_BACKOFF_S = 30.0
LONGEST_BACKOFF_S = 1920.0
LONGEST_TASK_BACKOFF_S = 120.0
"""Back-off after failures of the task's code: they are the same at every server, so no other server works
meanwhile."""
MAX_QUARANTINES = 3
"""Quarantines in a row for failures of its engine after which a server counts as broken for good."""


LIES_PER_QUARANTINE = 16
MAX_LIES = 8 * LIES_PER_QUARANTINE
"""Lies after which a server process is refused for good. With the preceding back-offs this takes two
hours."""
_FOR_GOOD_S = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Why a server gets no leases, and until when."""

    reason: str
    until_s: float
    is_of_task: bool = False
    """True: it is for failures of the task's code."""
    is_for_lies: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class ServerHealth:
    """Outcomes of one server process. `now_s`: the clock of its heartbeats."""

    quarantine: Quarantine | None = None
    has_outcome: bool = False
    """True once it has delivered a sample, or failed one by its own or the task's fault."""
    has_delivered: bool = False
    """True once one of its samples was accepted."""
    num_quarantines: int = 0
    """Number of quarantines since its last accepted sample."""
    num_engine_quarantines: int = 0
    """Number of these that were for failures of its engine."""
    has_failed_task: bool = False
    """True if a quarantine since its last accepted sample was for failures of the task's code."""
    num_lies: int = 0
    _rows: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    """Whether the server (or else the task) is at fault -> tickets with failed samples since the last
    success."""

    def is_broken(self, *, may_task_end: bool) -> bool:
        """True if more waiting is unlikely to help. `may_task_end`: one quarantine is enough for failures of
        the task's code; without it they count for nothing."""
        return (may_task_end and self.has_failed_task) or self.num_engine_quarantines >= MAX_QUARANTINES

    def succeed(self) -> None:
        """It delivered a sample that was accepted: the server is healthy."""
        self.has_outcome = self.has_delivered = True
        if self.num_quarantines or self._rows[True] or self._rows[False]:
            if self.quarantine is not None and not self.quarantine.is_for_lies:
                self.quarantine = None
            self.has_failed_task = False
            self.num_quarantines = self.num_engine_quarantines = 0
            self._rows = {True: set(), False: set()}

    def succeed_without_reward(self) -> None:
        """It delivered tokens that are trained on with reward 0: its engine works, the task may not."""
        self.has_outcome = self.has_delivered = True
        self._rows[True].clear()

    def fail(self, ticket_id: int, kind: FailureKind, error: str, *, limit: int, now_s: float) -> bool:
        """Counts a failure of a server that is not in quarantine. True if it begins one.

        `limit`: number of consecutive tickets that starts a quarantine.
        """
        self.has_outcome = True
        is_server_fault = kind in FAULTS_OF_SERVER
        row = self._rows[is_server_fault]
        if len(row) < limit:
            row.add(ticket_id)
        if len(row) < limit:
            return False
        longest_s = LONGEST_BACKOFF_S if is_server_fault else LONGEST_TASK_BACKOFF_S
        backoff_s = min(longest_s, FIRST_BACKOFF_S * 2**self.num_quarantines)
        self.num_quarantines += 1
        self.num_engine_quarantines += is_server_fault
        self.has_failed_task |= not is_server_fault
        reason = f"{len(row)} samples failed in a row, all of different tickets; the last: {error}"
        until_s = now_s + backoff_s
        self.quarantine = Quarantine(reason=reason, until_s=until_s, is_of_task=not is_server_fault)
        return True

    @property
    def is_refused(self) -> bool:
        """True if the server has lied so often that it is no longer served."""
        return self.num_lies >= MAX_LIES

    def lie(self, what: str, *, now_s: float) -> bool:
        """Counts a message that no server of this release sends. True if it begins a quarantine."""
        self.num_lies += 1
        rounds, rest = divmod(self.num_lies, LIES_PER_QUARANTINE)
        if rest:
            return False
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (rounds - 1))
        reason = f"it has sent {self.num_lies} messages that no rollout server sends; the last: {what}"
        if self.is_refused:
            backoff_s, reason = _FOR_GOOD_S, f"refused for good: {reason}"
        self.quarantine = Quarantine(reason=reason, until_s=now_s + backoff_s, is_for_lies=True)
        return True

    def end_backoff(self, *, now_s: float) -> None:
        """Ends a quarantine whose time is over; the next failure begins a longer one."""
        if self.quarantine is not None and self.quarantine.until_s <= now_s:
            self.quarantine = None
