"""How long things last in the buffer: ready groups until the trainer has them, leases until they end.

The ages are of this process: a restarted buffer has no time of what became ready before it, and counts a
restored lease from its own start. They are shown and decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from areal_like.histograms.buckets import LONG_S, Buckets
from buffer.tickets import LeaseRecord, Ticket

FINISHED, UNFINISHED = "finished", "unfinished"


def new_lease_ages() -> dict[str, Buckets]:
    """Seconds of leases by how they ended, none yet."""
    return {outcome: Buckets(LONG_S) for outcome in (FINISHED, UNFINISHED)}


class Ages:
    """`now_s` is the time of the operation in progress, by the clock of the caller, who sets it first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ready = Buckets(LONG_S)
        """Seconds from the last sample of a train group until the trainer first got the group."""
        self.leases: Mapping[str, Buckets] = new_lease_ages()
        """Seconds from the grant of a lease to its end, by how it ended."""

    def became_ready(self, ticket: Ticket) -> None:
        """The last sample of a group is here."""
        ticket.ready_s = self.now_s

    def served(self, ticket: Ticket) -> None:
        """The trainer gets a group; later times do not count."""
        if ticket.ready_s is not None:
            self.ready.observe(self.now_s - ticket.ready_s)
            ticket.ready_s = None

    def lease_ended(self, lease: LeaseRecord) -> None:
        """Every sample of it has arrived or failed; or it was lost or revoked before."""
        self.leases[UNFINISHED if lease.outstanding else FINISHED].observe(self.now_s - lease.granted_s)
