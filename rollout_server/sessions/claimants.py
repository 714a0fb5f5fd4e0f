"""Tracks who claims sessions and how they end: a claimant that fails repeatedly gets fewer, then none. Pure.

    GOOD -> sessions fail -> SLOWED: waits 1, 2, 4, ... s for the next -> REFUSED for ten minutes -> a try
      ^                        |                                                                      |
      +---- a good sample -----+----------------------------------------------------------------------+

A broken agent fails fast and can claim thousands of times a minute: without this it would take most sessions
from the healthy ones. A claimant is identified by its address, its token and the name that it chooses (the
client of this project names its process). Names are free, so claimants that have not delivered a sample yet
are slowed together, by address. A claimant that has delivered one is judged only by its own sessions, so
working agents on a machine continue while a broken one is slowed.

Sessions that fail at the same time usually have one cause, for example when a machine with a hundred of them
dies. So a failure counts only if its session was claimed after the previous failure. The first failure after
a good sample is attributed to the sample, which may be one that no agent can make; the following ones are
attributed to the claimant.

Whoever reports a session decides what counts as a good sample: one whose rewards could be added up, and of a
claim of several sessions at least half (`SessionBook`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

NUM_FREE = 3
"""Consecutive failures that do not delay the next session."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
NUM_REFUSED = 12
"""Consecutive failures after which a claimant is refused."""
REFUSED_S = 600.0
"""How long it is refused; then it gets one more session."""
MAX_REMEMBERED = 4096
_MAX_NAME_CHARS = 40
_MAX_ERROR_CHARS = 300
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Claimant:
    """The identity of a claimant."""

    address: str
    token: str = ""
    """A digest of the token."""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name[:_MAX_NAME_CHARS]!r} at {self.address}" if self.name else self.address

    @property
    def newcomers(self) -> Claimant:
        """Stands for all claimants of its address that have not delivered a sample yet."""
        return Claimant(address=self.address)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Why a claimant gets no session now."""

    wait_s: float
    reason: str
    is_refused: bool


@dataclass(kw_only=True)
class _Record:
    row: int = 0
    """Number of consecutive failed sessions."""
    failed_s: float = -math.inf
    """When the last of them failed."""
    until_s: float = -math.inf
    """It gets no session before this time."""
    error: str = ""
    has_delivered: bool = False

    def fail(self, error: str, *, claimed_s: float, now_s: float) -> None:
        self.error = error[:_MAX_ERROR_CHARS]
        if claimed_s < self.failed_s:  # of the same burst
            return
        self.row += 1
        self.failed_s = now_s
        wait_s = 0.0
        if self.row > NUM_FREE:
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self.row - NUM_FREE - 1, 10))
        self.until_s = now_s + wait_s

    def succeed(self) -> None:
        self.row, self.until_s, self.has_delivered = 0, -math.inf, True


class Claimants:
    """All claimants of one server. `now_s`: seconds on any monotonic clock."""

    def __init__(self) -> None:
        self._records: OrderedDict[Claimant, _Record] = OrderedDict()
        """In order of last use; the oldest are forgotten when there are many."""
        self.num_failures = 0
        """Number of sessions for which agents delivered no sample."""
        self.num_slowed = 0
        """Number of claims that were told to wait."""
        self.num_refused = 0
        """Number of claims that were refused."""

    def hold(self, claimant: Claimant, *, now_s: float) -> Hold | None:
        """Returns why a claimant gets no session now; None if it may have one."""
        own = self._records.get(claimant)
        if own is not None and claimant.name and own.row >= NUM_REFUSED:
            until_s = own.failed_s + REFUSED_S
            if now_s < until_s:
                self.num_refused += 1
                return self._hold(claimant, own, until_s - now_s, is_refused=True)
        judge = self._judge(claimant)
        record = self._records.get(judge)
        if record is None or record.until_s <= now_s:
            return None
        self.num_slowed += 1
        return self._hold(judge, record, record.until_s - now_s, is_refused=False)

    def fail(self, claimant: Claimant, error: str, *, claimed_s: float, now_s: float) -> bool:
        """Records a failed session. Returns True if the failure is attributed to the sample, because the
        claimant succeeded before."""
        self.num_failures += 1
        was_good = self._record(self._judge(claimant)).row == 0
        for one in {claimant, self._judge(claimant)}:
            self._record(one).fail(error, claimed_s=claimed_s, now_s=now_s)
        return was_good

    def deliver(self, claimant: Claimant) -> None:
        """Records that a session delivered a sample."""
        self._record(self._judge(claimant)).succeed()
        self._record(claimant).succeed()

    def troubles(self, *, now_s: float) -> dict[str, float]:
        """Returns the problems of the worst slowed claimants -> seconds since their last failure.

        The record that newcomers of an address share is left out if it only repeats one of theirs.
        """
        failing = [item for item in self._records.items() if item[1].row > NUM_FREE]
        failing.sort(key=lambda item: -item[1].row)
        named = {
            claimant.newcomers
            for claimant, record in failing
            if claimant != claimant.newcomers and not record.has_delivered
        }
        return {
            f"the last {record.row} sessions of {claimant} failed: {record.error}": now_s - record.failed_s
            for claimant, record in [item for item in failing if item[0] not in named][:_MOST_NAMED]
        }

    def _judge(self, claimant: Claimant) -> Claimant:
        """Returns the claimant by whose record this one is judged."""
        own = self._records.get(claimant)
        is_known = own is not None and own.has_delivered and claimant.name
        return claimant if is_known else claimant.newcomers

    def _record(self, claimant: Claimant) -> _Record:
        record = self._records.setdefault(claimant, _Record())
        self._records.move_to_end(claimant)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)
        return record

    def _hold(self, claimant: Claimant, record: _Record, wait_s: float, *, is_refused: bool) -> Hold:
        reason = (
            f"{record.row} sessions in a row of the agents {claimant} have failed "
            f"(the last: {record.error}): no session for {max(1, math.ceil(wait_s))} s"
        )
        return Hold(wait_s=wait_s, reason=reason, is_refused=is_refused)
