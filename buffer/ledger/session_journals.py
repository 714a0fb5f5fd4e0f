"""Journals of sessions, with which another server continues a session whose server has died.

    append(0) -> begun -> append(1) -> ... -> forgotten: its sample arrived or failed, or is not needed
                            ^    (the lease is lost, and the sample leased to another server, which reads it)
                            `----'

The buffer owns the right to generate, so it also decides who may add to a session: only the server with the
live lease of its sample. Leases are numbered, and a sample has at most one, so a server that lost the lease
without noticing, because it was slow or cut off, is refused (`lease`). It sends no client a response before
the entry is stored, so no turn and no reward exists twice.

A session keeps the staleness bound of its oldest token while it waits for another server, because the oldest
step of its leases counts as that of a lease (`Ticket.oldest_possible_step`).

Bounded: bytes of a journal and of all together (`sessions.journal_bytes`, `buffer.journals_bytes`). An entry
beyond them is refused (`full`), and the journal forgotten: without its end, a journal is of no use. A journal
ends with its sample, so none is older than its ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from areal_like.wire.messages.producer import (
    BATCH_BYTES,
    AppendSession,
    FindSession,
    ForgetSession,
    ReadSession,
)
from buffer.ledger.lifecycle import TicketRules
from buffer.tickets import Journal, LeaseRecord, Ticket

LEASE, FULL, GAP = "lease", "full", "gap"
"""Values of `SessionStored.refused`."""
_MAX_DIGITS = 19


class SessionJournals(TicketRules):
    """The ledger's operations on journals. `name`: the server that sent the message."""

    def append(self, name: str, message: AppendSession) -> str:
        """Adds an entry. Returns why not; empty if it is stored."""
        found = self._held(name, message)
        if found is None:
            return LEASE
        ticket, lease = found
        index, data = message.sample_index, message.data.tobytes()
        journal = ticket.journals.get(index)
        if message.number == 0 and (journal is None or journal.session != message.session):
            self._lifecycle.forget_journals(ticket, [index])
            journal = Journal(session=message.session, oldest_step=lease.weights_step)
        if journal is None or journal.session != message.session or message.number > journal.num_entries:
            self._lifecycle.forget_journals(ticket, [index])
            return GAP
        if message.number < journal.num_entries:
            return ""
        total = self._state.num_journal_bytes + len(data)
        if journal.num_bytes + len(data) > self._settings.journal_bytes or (
            total > self._settings.buffer.journals_bytes
        ):
            self._lifecycle.forget_journals(ticket, [index])
            self._counters.count("journals_full")
            return FULL
        journal.oldest_step = min(journal.oldest_step, lease.weights_step)
        self._store.put_entry(ticket.ticket_id, index, journal=journal, data=data)
        ticket.journals[index] = journal
        journal.num_entries += 1
        journal.num_bytes += len(data)
        self._state.num_journal_bytes += len(data)
        return ""

    def forget(self, name: str, message: ForgetSession) -> str:
        """Forgets a journal. Returns why not; empty if there is none now."""
        found = self._held(name, message)
        if found is None:
            return LEASE
        self._lifecycle.forget_journals(found[0], [message.sample_index])
        return ""

    def reader(self, name: str, message: ReadSession) -> Callable[[], tuple[Journal | None, list[bytes]]]:
        """A function that returns the journal and some of its entries; call it when all writes so far are
        durable."""

        def read() -> tuple[Journal | None, list[bytes]]:
            found = self._held(name, message)
            journal = None if found is None else found[0].journals.get(message.sample_index)
            if journal is None:
                return None, []
            entries = self._store.entries_of(
                message.ticket_id, message.sample_index, first=message.first, max_bytes=BATCH_BYTES
            )
            return journal, entries

        return read

    def find(self, message: FindSession) -> tuple[bool, str]:
        """Returns (whether the session can be continued, the server that has leased it or an empty
        string)."""
        ticket, index = self._of_id(message.session)
        journal = None if ticket is None else ticket.journals.get(index)
        if ticket is None or journal is None or journal.session != message.session:
            return False, ""
        leases = (lease.server for lease in ticket.leases.values() if index in lease.outstanding)
        return True, next(leases, "")

    def _held(
        self, name: str, message: AppendSession | ForgetSession | ReadSession
    ) -> tuple[Ticket, LeaseRecord] | None:
        """The ticket and lease of a sample that this server holds now under this lease."""
        ticket = self._tickets.live.get(message.ticket_id)
        lease = None if ticket is None else ticket.leases.get(message.lease_id)
        if ticket is None or lease is None or lease.server != name:
            return None
        return (ticket, lease) if message.sample_index in lease.outstanding else None

    def _of_id(self, session: str) -> tuple[Ticket | None, int]:
        parts = session.split("-")
        if len(parts) < 3 or not all(map(_is_number, parts[:2])):
            return None, 0
        ticket_id, index = int(parts[0]), int(parts[1])
        return self._tickets.live.get(ticket_id), index


def num_bytes_of(tickets: Iterable[Ticket]) -> int:
    """Bytes of all journals."""
    return sum(journal.num_bytes for ticket in tickets for journal in ticket.journals.values())


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
