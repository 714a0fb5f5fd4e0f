"""The journal of one session, with a store of the test in place of the buffers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from areal_like.errors import SessionGoneError
from areal_like.wire.messages.producer import AppendSession, ForgetSession
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.claimants import Claimant
from rollout_server.sessions.journal import JournalCounts, JournalState, SessionJournal, read_journal
from rollout_server.sessions.open_session import OpenSession, SessionState
from tests.rollout_server.sessions.test_open_session import make, run
from tests.support import moved_clock
from tests.support.moved_clock import advance


@dataclass(eq=False)
class Store:
    """Holds the journal of one sample, and what is sent to it back until it is open."""

    entries: list[bytes] = field(default_factory=list)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)

    async def append_session(self, entry: AppendSession) -> str:
        await self.is_open.wait()
        if entry.number != len(self.entries):
            return "gap"
        self.entries.append(entry.data.tobytes())
        return ""

    async def forget_session(self, forgotten: ForgetSession) -> str:
        await self.is_open.wait()
        self.entries.clear()
        return ""


def waiting(store: Store) -> OpenSession:
    journal = SessionJournal(
        store, lease_id=3, ticket_id=7, sample_index=0, session="7-0-3", max_bytes=1000,
        counts=JournalCounts(),
    )  # fmt: skip
    session = make(is_waiting=True, journal=journal)
    session.claimant = Claimant(address="1.2.3.4")
    return session


async def claimed(store: Store) -> OpenSession:
    """An open session whose claim is recorded."""
    store.is_open.set()
    session = waiting(store)
    await session.offered(nonce="n")
    session.claim()
    return session


def test_a_claim_taken_back_leaves_no_entry() -> None:
    """Of a group, one session may be lost while the entry of another is on its way."""

    async def body() -> None:
        store, book = Store(), SessionBook()
        session = waiting(store)
        book.add(session)
        assert book.offer() is session
        offered = asyncio.create_task(session.offered(nonce="first"))
        await asyncio.sleep(0)
        book.take_back(session)
        store.is_open.set()
        await offered
        assert book.offer() is session
        await session.offered(nonce="second")
        recorded = read_journal("7-0-3", store.entries, conversation=session.conversation)
        assert recorded.claim["nonce"] == "second"

    run(body())


def test_an_entry_that_cannot_be_written_is_none(caplog: pytest.LogCaptureFixture) -> None:
    """An integer of a client may have any number of digits, which msgpack does not have."""

    async def body() -> None:
        store = Store()
        session = await claimed(store)
        assert session.journal is not None and len(store.entries) == 1
        await session.journal.posted(metrics={"a": 10**30})
        assert session.journal.state is JournalState.OFF and not store.entries

    run(body())
    assert "would not survive this server" in caplog.text


def test_a_claim_whose_entry_was_not_acknowledged_is_forgotten() -> None:
    """The client that claims it may go while its entry is on its way to the buffer."""

    async def body() -> None:
        store = Store()
        session = waiting(store)
        assert session.journal is not None
        offered = asyncio.create_task(session.offered(nonce="first"))
        await asyncio.sleep(0)
        offered.cancel()
        await asyncio.gather(offered, return_exceptions=True)
        store.entries.append(b"it has arrived")
        store.is_open.set()
        await session.journal.forget()
        assert session.journal.state is JournalState.OFF and not store.entries

    run(body())


def test_a_session_is_not_idle_while_its_end_is_recorded() -> None:
    """The buffer may be starting again."""

    async def body() -> None:
        store = Store()
        session = await claimed(store)
        ended = asyncio.create_task(session.wait_ended(idle_timeout_s=3.0, deadline_s=lambda: None))
        store.is_open.clear()
        ending = asyncio.create_task(session.end_recorded())
        await asyncio.sleep(0)
        advance(10.0)
        await asyncio.sleep(0.05)
        assert not ended.done() and not ending.done()
        store.is_open.set()
        await ending
        assert await ended == "" and session.state is SessionState.ENDED

    moved_clock.run(body())


def test_an_end_does_not_succeed_if_its_session_is_closed() -> None:
    async def body() -> None:
        store = Store()
        session = await claimed(store)
        store.is_open.clear()
        ending = asyncio.create_task(session.end_recorded())
        await asyncio.sleep(0)
        session.close("its lease was cancelled")
        store.is_open.set()
        with pytest.raises(SessionGoneError, match="its lease was cancelled"):
            await ending
        assert session.end_answer is None

    run(body())
