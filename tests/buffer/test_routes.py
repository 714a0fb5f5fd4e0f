"""Routes in the buffer: required where they are trained on, durable and deleted with their records."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from areal_like.errors import StoreCorruptError
from areal_like.wire.codec import decode, encode
from areal_like.wire.messages.consumer import Group, StartTraining
from areal_like.wire.messages.hello import Ok
from areal_like.wire.messages.producer import Lease, SampleDone
from areal_like.wire.records import Record, RecordLocation, read_record, segment_path
from areal_like.wire.routes import Routes, RoutesShape
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.ledger.state import LedgerState
from buffer.service.outbox import Outbox
from buffer.service.peers import ConnectedPeers
from buffer.storage.memory import MemoryStore
from buffer.tickets import State, Ticket, Verdict
from launch.audit.ledger import audit_ledger
from tests.buffer.test_store import full_ticket, is_whole, num_segments, opened, query
from tests.support.ledger_simulation import add_server, deliver, done, ledger_settings, new_ledger
from tests.support.row_store import RowStore
from tests.support.store_load import SIZE, durable, is_same, move, new_ticket, sample_of, trajectory_of

ROUTED, PLAIN = 2, 1
"""Tickets of store_load.py, with and without routes."""


def with_routes(sample: SampleDone) -> SampleDone:
    made = sample.record.trajectory()
    routes = Routes(np.zeros((made.num_tokens - 1, 2, 1), np.uint8), 4)
    routed = dataclasses.replace(made, routes=routes)
    return dataclasses.replace(sample, record=Record.of(sample.ticket_id, sample.sample_index, routed))


def leased(**settings: object) -> tuple[Any, Lease]:
    ledger = new_ledger(**settings)
    add_server(ledger, "a", capacity=16)
    return ledger, ledger.dispatcher.grant(now_s=0.0)["a"][0]


def test_samples_that_are_trained_on_need_routes() -> None:
    ledger, lease = leased(router_replay=True)
    assert deliver(ledger, "a", done(lease, 0, [0, 0])) is Verdict.INVALID
    counters = ledger.state.counters.summary()
    assert counters["failed_routes_retry"] == 1 and counters["refusals_invalid"] == 1
    ledger, lease = leased(router_replay=True)
    assert deliver(ledger, "a", with_routes(done(lease, 0, [0, 0]))) is Verdict.ACCEPTED
    assert ledger.state.counters.summary()["samples_failed"] == 0


def test_greedy_samples_have_no_routes() -> None:
    ledger, lease = leased(router_replay=True, num_greedy=1)
    (greedy,) = lease.greedy_indices
    assert deliver(ledger, "a", with_routes(done(lease, greedy, [0, 0]))) is Verdict.INVALID
    ledger, lease = leased(router_replay=True, num_greedy=1)
    assert deliver(ledger, "a", done(lease, greedy, [0, 0])) is Verdict.ACCEPTED


def test_without_the_setting_routes_are_refused() -> None:
    ledger, lease = leased()
    assert deliver(ledger, "a", with_routes(done(lease, 0, [0, 0]))) is Verdict.INVALID
    assert deliver(ledger, "a", done(lease, 1, [0, 0])) is Verdict.ACCEPTED


@pytest.mark.parametrize("shape", [(2, 1, 4), (3, 1, 4), (2, 2, 4), (2, 1, 8), None])
def test_routes_of_another_model_are_refused(shape: tuple[int, int, int] | None) -> None:
    """By the shape that the trainer has declared, which a restarted buffer still has."""
    store, settings = RowStore(), ledger_settings(router_replay=True, durable=True)
    ledger = recover(settings, store, now_s=0.0)
    want = None if shape is None else RoutesShape(*shape)
    ledger.trainer.start_training(incarnation=1, step=0, stream={}, routes_shape=want)
    ledger = recover(settings, store.copy(), now_s=0.0)
    ledger.state.prompts.set_num_train_prompts(8)
    add_server(ledger, "a", capacity=16)
    lease = ledger.dispatcher.grant(now_s=0.0)["a"][0]
    is_right = shape in (None, (2, 1, 4))
    verdict = deliver(ledger, "a", with_routes(done(lease, 0, [0, 0])))
    assert verdict is (Verdict.ACCEPTED if is_right else Verdict.INVALID)
    counters = ledger.state.counters.summary()
    numbers = [counters.get(name, 0) for name in ("failed_routes_retry", "refusals_invalid")]
    assert numbers == [int(not is_right)] * 2


def test_a_trainer_declares_possible_routes_only() -> None:
    message = StartTraining(step=0, routes_shape=[48, 8, 128])
    assert decode(encode(message)) == (message, 0)
    for shape in ([48, 8], [0, 8, 128], [48, 8, 1 << 20]):
        with pytest.raises((ValueError, TypeError)):
            StartTraining(step=0, routes_shape=shape)


def test_memory_without_a_ledger_counts_routes() -> None:
    store, ticket = MemoryStore(), new_ticket(ROUTED, num_samples=1)
    sample = trajectory_of(ROUTED, 0)
    assert sample.routes is not None
    record = Record.of(ROUTED, 0, sample)
    ticket.samples[0] = sample_of(ROUTED, 0, sample)
    store.put_sample(ticket.samples[0], record)
    assert store.num_bytes == len(record.data) + len(sample.routes.to_bytes())
    assert store.records_of(ticket)[0].routes is not None
    store.release(ticket)
    assert store.num_bytes == 0


def test_routes_leave_memory_when_they_are_on_disk(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            tickets = [full_ticket(store, ticket_id) for ticket_id in (PLAIN, ROUTED)]
            records = [
                Record.of(ticket.ticket_id, index, trajectory_of(ticket.ticket_id, index))
                for ticket in tickets
                for index in range(SIZE)
            ]
            assert store.num_bytes == sum(record.num_bytes for record in records)
            await durable(store)
            assert store.num_bytes == sum(len(record.data) for record in records)
            assert all(is_whole(store, ticket) for ticket in tickets), "they are read back"
            assert store.num_bytes == sum(len(record.data) for record in records)
        size = segment_path(tmp_path, 0).stat().st_size
        assert size == sum(record.num_bytes for record in records)
        assert query(tmp_path, "SELECT num_bytes FROM segments") == [(size,)]

    asyncio.run(run())


def test_routes_are_deleted_with_their_segment(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, segment_bytes=1 << 16) as (store, _):
            tickets = []
            for ticket_id in range(ROUTED, 80, 2):
                tickets.append(full_ticket(store, ticket_id))
                await durable(store)
            assert num_segments(tmp_path) >= 5
            for ticket in tickets:
                move(store, ticket, State.TRAINED)
                store.release(ticket)
                await durable(store)
            full_ticket(store, 81)
            await durable(store)
            assert num_segments(tmp_path) <= 2

    asyncio.run(run())


@pytest.mark.parametrize("lost", ["routes", "part", "row"])
def test_what_was_not_acknowledged_is_removed(lost: str, tmp_path: Path) -> None:
    """A kill between the writes of one sample: the record without its routes, or both without their row."""

    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            full_ticket(store, ROUTED)
            await durable(store)

    asyncio.run(write())
    path = segment_path(tmp_path, 0)
    size = path.stat().st_size
    sample = trajectory_of(4, 0)
    assert sample.routes is not None
    record, routes = Record.of(4, 0, sample).data, sample.routes.to_bytes()
    with path.open("ab") as file:
        file.write(record + {"routes": b"", "part": routes[:-5], "row": routes}[lost])

    async def read() -> None:
        async with opened(tmp_path) as (store, found):
            assert [ticket.ticket_id for ticket in found.tickets] == [ROUTED]
            assert is_whole(store, found.tickets[0])

    asyncio.run(read())
    assert path.stat().st_size == size


def damage(directory: Path, ticket_id: int, *, cut: bool = False) -> None:
    """Changes a byte of the routes of a ticket's last sample, or cuts the file off within them."""
    ((segment, offset, size),) = query(
        directory,
        f"SELECT segment, offset, num_bytes FROM samples WHERE ticket_id = {ticket_id} "
        f"AND sample_index = {SIZE - 1}",
    )
    with segment_path(directory, segment).open("r+b") as file:
        at = offset + size + 40
        if cut:
            file.truncate(at)
            return
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("cut", [False, True])
def test_damaged_routes_are_reported_at_the_start(cut: bool, tmp_path: Path) -> None:
    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            full_ticket(store, ROUTED)
            await durable(store)

    asyncio.run(write())
    damage(tmp_path, ROUTED, cut=cut)

    async def read() -> None:
        async with opened(tmp_path):
            pytest.fail("the buffer started")

    with pytest.raises(StoreCorruptError, match=f"sample {SIZE - 1} of ticket {ROUTED} .*routes"):
        asyncio.run(read())


def test_routes_cut_off_in_an_older_file_are_reported(tmp_path: Path) -> None:
    """As after a power failure with durability=process_crash, when older files may lack their ends too."""

    async def write() -> Ticket:
        async with opened(tmp_path, segment_bytes=1 << 16) as (store, _):
            tickets: list[Ticket] = []
            while num_segments(tmp_path) < 2:
                tickets.append(full_ticket(store, ROUTED + 2 * len(tickets)))
                await durable(store)
            return tickets[0]

    intact = asyncio.run(write())
    ((segment, end, ticket_id, index),) = query(
        tmp_path,
        "SELECT segment, offset + num_bytes, ticket_id, sample_index FROM samples "
        "WHERE segment = (SELECT min(segment) FROM segments) ORDER BY offset DESC LIMIT 1",
    )
    assert ticket_id != intact.ticket_id
    with segment_path(tmp_path, segment).open("r+b") as file:
        file.truncate(end + 40)

    async def read() -> None:
        async with opened(tmp_path):
            pytest.fail("the buffer started")

    with pytest.raises(StoreCorruptError, match=f"^sample {index} of ticket {ticket_id} .*routes.*$"):
        asyncio.run(read())


def test_damaged_routes_are_never_served(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, segment_bytes=1 << 16) as (store, _):
            tickets: list[Ticket] = []
            while num_segments(tmp_path) < 2:
                tickets.append(full_ticket(store, ROUTED + 2 * len(tickets)))
                await durable(store)
            damage(tmp_path, ROUTED)
            with pytest.raises(StoreCorruptError, match=f"of ticket {ROUTED} .*routes"):
                store.routes_reader(store.records_of(tickets[0]))()
            assert is_whole(store, tickets[1])

    asyncio.run(run())


def test_the_audit_reads_routes(tmp_path: Path) -> None:
    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            for ticket_id in (PLAIN, ROUTED, 4):
                move(store, full_ticket(store, ticket_id), State.READY)
            await durable(store)

    asyncio.run(write())
    on_disk = "every trajectory that may be trained on is on disk as it was written"

    def offenders() -> list[str]:
        (check,) = [check for check in audit_ledger(tmp_path).result.checks if check.text == on_disk]
        assert check.num_checked == 3 * SIZE
        return [str(offender) for offender in check.offenders]

    assert not offenders()
    damage(tmp_path, 4)
    (found,) = offenders()
    assert f"sample {SIZE - 1} of ticket 4" in found and "routes" in found


def test_records_are_read_without_their_routes(tmp_path: Path) -> None:
    """As by `areal-like samples`: damage of the routes does not matter."""

    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            full_ticket(store, ROUTED)
            await durable(store)

    asyncio.run(write())
    damage(tmp_path, ROUTED)
    (place,) = query(tmp_path, "SELECT segment, offset, num_bytes, crc32 FROM samples WHERE sample_index = 1")
    record = read_record(tmp_path, RecordLocation(*place), ticket_id=ROUTED, sample_index=1)
    assert record.lacks_routes and record.trajectory().routes is None


def test_a_group_is_sent_when_its_routes_are_read(tmp_path: Path) -> None:
    """A thread reads them. Damage ends the job, unless the group is no longer recorded."""

    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            ticket = full_ticket(store, ROUTED)
            await durable(store)
            ledger = Ledger(LedgerState(ledger_settings(), store))
            happened: asyncio.Queue[Any] = asyncio.Queue()
            listener: Any = SimpleNamespace(send=lambda peer, message, rid: happened.put_nowait(message))
            outbox = Outbox(
                ledger, ConnectedPeers(job="j", dataset="d"), listener, on_error=happened.put_nowait
            )

            async def answered() -> Any:
                records = store.records_of(ticket)
                assert all(record.lacks_routes for record in records)
                group = Group(
                    step=ticket.step, position=0, ticket_id=ROUTED, prompt_index=0, records=records,
                    version_steps=[0] * SIZE,
                )  # fmt: skip
                outbox.send_when_durable(b"", group, rid=1)
                assert happened.empty(), "it was read in the loop"
                outbox.send_when_durable(b"", Ok(), rid=2)
                assert await happened.get() == Ok(), "others do not wait"
                return await happened.get()

            sent = await answered()
            assert all(
                is_same(record.trajectory(), trajectory_of(ROUTED, index))
                for index, record in enumerate(sent.records)
            )
            damage(tmp_path, ROUTED)
            ledger.state.steps.add(ticket)
            assert isinstance(await answered(), StoreCorruptError)
            outbox.close()

    asyncio.run(run())
