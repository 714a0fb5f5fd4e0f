"""Journals of sessions in the ledger: who may write them, what is kept, and for how long."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.errors import WireError
from areal_like.wire.codec import decode, encode
from areal_like.wire.messages.producer import AppendSession, FindSession, ForgetSession, Lease, ReadSession
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.ledger.session_journals import FULL, GAP, LEASE
from buffer.storage.durable import DurableStore
from buffer.tickets import Journal, State, Verdict
from tests.support.ledger_simulation import add_server, beat, deliver, done, failed, new_ledger
from tests.support.row_store import RowStore
from tests.support.store_load import durable, new_ticket, raising, store_settings

ONE: dict[str, Any] = {"groups_per_step": 1, "max_staleness": 2, "num_steps": 6, "journal_bytes": 100}


def leased(ledger: Ledger, name: str, *, now_s: float = 0.0) -> Lease:
    """The only new lease of a server."""
    (lease,) = ledger.dispatcher.grant(now_s=now_s)[name]
    return lease


def entry(
    lease: Lease, number: int, data: bytes = b"data", *, index: int = 0, tries: str = ""
) -> AppendSession:
    return AppendSession(
        lease_id=lease.lease_id,
        ticket_id=lease.ticket_id,
        sample_index=index,
        session=f"{lease.ticket_id}-{index}-1{tries}",
        number=number,
        data=np.frombuffer(data, np.uint8),
    )


def read(
    ledger: Ledger, name: str, lease: Lease, *, index: int = 0, first: int = 0
) -> tuple[str, list[bytes]]:
    request = ReadSession(lease_id=lease.lease_id, ticket_id=lease.ticket_id, sample_index=index, first=first)
    journal, entries = ledger.journals.reader(name, request)()
    return ("" if journal is None else journal.session), entries


def test_only_the_server_with_the_lease_writes_a_journal() -> None:
    ledger = new_ledger(**ONE)
    add_server(ledger, "a", capacity=2)
    old = leased(ledger, "a")
    assert old.sessions == []
    assert [ledger.journals.append("a", entry(old, number)) for number in (0, 1, 1)] == ["", "", ""]
    assert ledger.journals.append("b", entry(old, 2)) == LEASE
    assert ledger.journals.append("a", dataclasses.replace(entry(old, 2), sample_index=5)) == LEASE
    id = f"{old.ticket_id}-0-1"
    assert ledger.journals.find(FindSession(session=id)) == (True, "a")
    assert ledger.dispatcher.expire(now_s=1000.0) == ["a"]
    assert ledger.journals.find(FindSession(session=id)) == (True, "")
    add_server(ledger, "b", capacity=2, now_s=1000.0)
    new = leased(ledger, "b", now_s=1000.0)
    assert new.ticket_id == old.ticket_id and new.sessions == [0] and new.lease_id > old.lease_id
    assert read(ledger, "b", new) == (id, [b"data", b"data"])
    assert read(ledger, "b", new, first=1) == (id, [b"data"]) and read(ledger, "a", old) == ("", [])
    # The first server was only slow: it comes back, and continues as if nothing had happened.
    add_server(ledger, "a", capacity=0, now_s=1000.0)
    assert ledger.journals.append("a", entry(old, 2)) == LEASE
    assert ledger.journals.forget("a", _forgotten(old)) == LEASE
    assert deliver(ledger, "a", done(old, 0, [0])) is Verdict.SUPERSEDED
    assert ledger.journals.append("b", entry(new, 2, b"more")) == ""
    assert read(ledger, "b", new, first=2) == (id, [b"more"])
    assert deliver(ledger, "b", done(new, 0, [0])) is Verdict.ACCEPTED
    assert ledger.journals.find(FindSession(session=id)) == (False, "")
    assert ledger.state.num_journal_bytes == 0 and ledger.journals.append("b", entry(new, 3)) == LEASE


def _forgotten(lease: Lease) -> ForgetSession:
    return ForgetSession(lease_id=lease.lease_id, ticket_id=lease.ticket_id, sample_index=0)


def test_a_journal_ends_with_its_session() -> None:
    ledger = new_ledger(**ONE)
    add_server(ledger, "a", capacity=2)
    lease = leased(ledger, "a")
    ticket = ledger.state.tickets.live[lease.ticket_id]
    for end in (
        lambda: ledger.journals.forget("a", _forgotten(lease)),
        lambda: ledger.journals.append("a", entry(lease, 5)),  # an entry is missing
        lambda: ledger.journals.append("a", entry(lease, 1, b"x" * 100)),  # too large
        lambda: ledger.intake.sample_failed("a", failed(lease, 0)),
    ):
        assert ledger.journals.append("a", entry(lease, 0)) == "" and 0 in ticket.journals
        end()
        assert ticket.journals == {} and ledger.state.num_journal_bytes == 0
    # Another agent begins anew: its journal replaces that of the agent before.
    assert ledger.journals.append("a", entry(lease, 0, index=1)) == ""
    assert ledger.journals.append("a", entry(lease, 1, index=1, tries="-2")) == GAP
    assert ledger.journals.append("a", entry(lease, 0, b"new", index=1, tries="-2")) == ""
    assert read(ledger, "a", lease, index=1) == (f"{lease.ticket_id}-1-1-2", [b"new"])
    assert ledger.journals.append("a", entry(lease, 1, b"x" * 101, index=1, tries="-2")) == FULL
    assert ledger.state.counters["journals_full"] == 2


def test_all_journals_together_are_bounded() -> None:
    ledger = new_ledger(**ONE, journals_bytes=10)
    add_server(ledger, "a", capacity=2)
    lease = leased(ledger, "a")
    assert ledger.journals.append("a", entry(lease, 0, b"x" * 6)) == ""
    assert ledger.journals.append("a", entry(lease, 0, b"x" * 6, index=1)) == FULL
    assert ledger.state.num_journal_bytes == 6


def test_an_entry_without_bytes_is_refused() -> None:
    """The limits count bytes, so a peer could write any number of empty entries."""
    ledger = new_ledger(**ONE)
    add_server(ledger, "a", capacity=2)
    message = entry(leased(ledger, "a"), 0)
    object.__setattr__(message, "data", np.empty(0, np.uint8))
    with pytest.raises(WireError, match="0 bytes"):
        decode(encode(message))


def test_journals_are_read_whatever_the_directory_is_called(tmp_path: Path) -> None:
    async def run() -> None:
        store = DurableStore(tmp_path / "50% #1?x", store_settings(), on_error=raising)
        store.recover()
        ticket = new_ticket(1)
        store.put_ticket(ticket)
        store.put_entry(1, 0, journal=Journal(session="1-0-1", oldest_step=0), data=b"data")
        await durable(store)
        assert store.entries_of(1, 0, first=0, max_bytes=100) == [b"data"]
        store.close()

    asyncio.run(run())


def test_a_session_keeps_the_bound_of_its_first_lease() -> None:
    ledger = new_ledger(**ONE | {"max_staleness": 1, "group_size": 1}, group_filter="none")
    add_server(ledger, "a", capacity=1)
    lease = leased(ledger, "a")
    assert ledger.journals.append("a", entry(lease, 0)) == ""
    ticket = ledger.state.tickets.live[lease.ticket_id]
    add_server(ledger, "b", capacity=1)
    other = leased(ledger, "b")
    deliver(ledger, "b", done(other, 0, [0]))
    ledger.trainer.complete_step(incarnation=1, step=0)
    version = ledger.trainer.alloc_version(incarnation=1, step=1)
    ledger.dispatcher.remove_server("a")
    assert ticket.oldest_possible_step == 0, "its tokens are from the first weights"
    beat(ledger, "b", capacity=2, version=version)
    new = ledger.dispatcher.grant(now_s=0.0)["b"]
    assert new[0].ticket_id == lease.ticket_id and new[0].sessions == [0]
    assert deliver(ledger, "b", done(new[0], 0, [0, version])) is Verdict.ACCEPTED
    assert ticket.state is State.BATCHED and ticket.step == 1, "in the last step within the bound"


def test_journals_survive_the_buffer() -> None:
    store = RowStore()
    ledger = new_ledger(store=store, durable=True, **ONE)
    add_server(ledger, "a", capacity=2)
    lease = leased(ledger, "a")
    for number, data in enumerate((b"one", b"two")):
        assert ledger.journals.append("a", entry(lease, number, data)) == ""
    ledger.journals.append("a", entry(lease, 0, index=1))
    ledger.journals.append("a", entry(lease, 7, index=1))  # forgets it
    again = recover(ledger.settings, store.copy(), now_s=0.0)
    ticket = again.state.tickets.live[lease.ticket_id]
    assert list(ticket.journals) == [0] and again.state.num_journal_bytes == 6
    journal = ticket.journals[0]
    assert isinstance(journal, Journal) and (journal.num_entries, journal.oldest_step) == (2, 0)
    assert again.journals.append("a", entry(lease, 1, b"two")) == "", "sent again: the reply was lost"
    assert again.journals.append("a", entry(lease, 2, b"three")) == ""
    assert read(again, "a", lease) == (f"{lease.ticket_id}-0-1", [b"one", b"two", b"three"])
    assert again.state.session_secret == ledger.state.session_secret


def test_sessions_of_abandoned_weights_end() -> None:
    ledger = new_ledger(**ONE | {"group_size": 1}, group_filter="none")
    add_server(ledger, "a", capacity=1)
    deliver(ledger, "a", done(leased(ledger, "a"), 0, [0]))
    ledger.trainer.complete_step(incarnation=1, step=0)
    version = ledger.trainer.alloc_version(incarnation=1, step=1)
    beat(ledger, "a", capacity=1, version=version)
    lease = leased(ledger, "a")
    assert ledger.journals.append("a", entry(lease, 0)) == ""
    ledger.trainer.start_training(incarnation=2, step=0, stream={})
    assert ledger.state.num_journal_bytes == 0
