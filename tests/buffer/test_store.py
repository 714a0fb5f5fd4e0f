"""The durable store: recovery, damage, full disks, and deletion of what is not needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_like.errors import ConfigError, StoreCorruptError, UserError
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import Record, segment_path
from buffer.prompts.order import Prompt
from buffer.storage import sql
from buffer.storage.base import LeaseRow, Recovered, RollbackRow, VersionRow
from buffer.storage.durable import DurableStore
from buffer.storage.writer import lock_holder
from buffer.tickets import Drop, LeaseRecord, State, Ticket
from tests.support.buffer_harness import job
from tests.support.small_disk import small_disk
from tests.support.store_load import (
    SIZE,
    durable,
    is_same,
    move,
    new_ticket,
    put_sample,
    raising,
    store_settings,
    train,
    trajectory_of,
)


@contextlib.asynccontextmanager
async def opened(
    directory: Path, *, on_error: Callable[[Exception], None] = raising, **settings: Any
) -> AsyncIterator[tuple[DurableStore, Recovered]]:
    """A store, and the rows that it recovered."""
    store = DurableStore(directory, store_settings(**settings), on_error=on_error)
    try:
        yield store, store.recover()
    finally:
        store.close()


def full_ticket(store: DurableStore, ticket_id: int) -> Ticket:
    """Writes a new ticket and all of its samples."""
    ticket = new_ticket(ticket_id)
    store.put_ticket(ticket)
    for index in range(SIZE):
        put_sample(store, ticket, index)
    return ticket


def is_whole(store: DurableStore, ticket: Ticket) -> bool:
    """True if the store returns the records that `full_ticket` wrote."""
    group = [record.trajectory() for record in store.routes_reader(store.records_of(ticket))()]
    return all(is_same(mine, trajectory_of(ticket.ticket_id, index)) for index, mine in enumerate(group))


def query(directory: Path, statement: str) -> list[tuple[Any, ...]]:
    """Queries the ledger file as an operator would."""
    with contextlib.closing(sqlite3.connect(directory / "ledger.sqlite3")) as ledger:
        return ledger.execute(statement).fetchall()


def num_segments(directory: Path) -> int:
    return len(list((directory / "segments").glob("*.seg")))


async def wait_until(condition: Callable[[], bool]) -> None:
    """Polls a condition that the writer's thread brings about."""
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("durability", ["process_crash", "power_loss"])
def test_every_row_is_recovered(tmp_path: Path, durability: str) -> None:
    async def write() -> None:
        async with opened(tmp_path, durability=durability) as (store, found):
            assert found == Recovered()
            leased, ready = new_ticket(1, num_samples=3), full_ticket(store, 2)
            store.put_ticket(leased)
            put_sample(store, leased, 1)
            leased.num_failures[2] = 2
            store.put_failure(leased, 2)
            for lease_id in (70, 71):
                lease = LeaseRecord(
                    lease_id=lease_id,
                    ticket_id=1,
                    server="a",
                    weights_step=5,
                    outstanding={0, 2},
                    expires_s=9.0,
                )
                store.put_lease(lease, server_incarnation=1 << 60)
            move(store, leased, State.LEASED)
            store.end_lease(71)
            move(store, ready, State.READY)
            trained, dropped, evaluated = full_ticket(store, 3), full_ticket(store, 4), new_ticket(5)
            trained.step, trained.position, dropped.drop, evaluated.purpose = 7, 2, Drop.STALE, Purpose.EVAL
            for ticket, state in (
                (trained, State.TRAINED),
                (dropped, State.DROPPED),
                (evaluated, State.EVALUATED),
            ):
                move(store, ticket, state)
            store.put_row(VersionRow(version=1, step=0, parent=0, trainer_incarnation=8))
            store.put_row(VersionRow(version=2, step=1, parent=1, trainer_incarnation=8))
            store.put_scalar("cursor", 11)
            store.put_scalar("cursor", 12)
            for index in (5, 6, 7):
                store.push_returned(Prompt(index=index, parent=index + 1, num_reissues=1))
            store.pop_returned()
            store.put_attempt(7, 2)
            store.put_attempt(6, 1)
            store.put_attempt(6, 0)
            store.put_row(
                RollbackRow(
                    trainer_incarnation=9, from_step=8, to_step=6, num_tickets=4, num_tokens=99, unix_s=1.5
                )
            )
            store.put_counters({"tokens": 1 << 53, "mean": 0.1})
            await durable(store)

    async def read() -> None:
        async with opened(tmp_path, durability=durability) as (store, found):
            leased, ready = found.tickets
            assert (leased.state, leased.unleased, set(leased.samples), leased.num_failures) == (
                State.LEASED,
                {0, 2},
                {1},
                {2: 2},
            )
            assert (ready.state, ready.unleased, ready.leases, ready.purpose) == (
                State.READY,
                set(),
                {},
                Purpose.TRAIN,
            )
            assert ready.samples[1].reward == trajectory_of(2, 1).reward and ready.samples[1].lease_id == 102
            assert [(ticket.ticket_id, ticket.step, ticket.position) for ticket in found.trained] == [
                (3, 7, 2)
            ]
            assert found.leases == [
                LeaseRow(
                    lease_id=70,
                    ticket_id=1,
                    server="a",
                    server_incarnation=1 << 60,
                    weights_step=5,
                    outstanding=frozenset({0, 2}),
                )
            ]
            assert [(row.version, row.parent) for row in found.versions] == [(1, 0), (2, 1)]
            assert found.scalars == {"cursor": 12} and found.attempts == {7: 2} and found.num_issued == 5
            assert [prompt.index for prompt in found.returned] == [6, 7]
            assert found.rollbacks[0].num_tokens == 99 and found.counters == {
                "tokens": 1 << 53,
                "mean": 0.1,
            }
            assert found.ended == {
                (Purpose.TRAIN, State.TRAINED, None): 1,
                (Purpose.TRAIN, State.DROPPED, Drop.STALE): 1,
                (Purpose.EVAL, State.EVALUATED, None): 1,
            }
            assert is_whole(store, ready)
            assert is_whole(store, found.trained[0])
            store.pop_returned()
            store.push_returned(Prompt(index=8))

    async def read_again() -> None:
        async with opened(tmp_path) as (_, found):
            assert [prompt.index for prompt in found.returned] == [7, 8]

    asyncio.run(write())
    asyncio.run(read())
    asyncio.run(read_again())


def test_callbacks_keep_their_order_and_wait_for_the_disk(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            called: list[int] = []
            for number in range(50):
                full_ticket(store, number + 1)
                store.when_durable(lambda number=number: called.append(number))  # type: ignore[misc]
                if number % 7 == 3:
                    await asyncio.sleep(0.001)
                    assert len(called) <= number + 1
            assert len(called) < 50, "called before anything was written"
            store.when_durable(lambda: called.append(50))
            await wait_until(lambda: len(called) == 51)
            assert called == list(range(51))
            assert query(tmp_path, "SELECT count(*) FROM samples") == [(50 * SIZE,)]
            store.when_durable(lambda: called.append(51))
            assert called[-1] == 51, "nothing to wait for"

    asyncio.run(run())


def test_a_failing_callback_is_reported_and_loses_no_other(tmp_path: Path) -> None:
    async def run() -> None:
        errors: list[Exception] = []
        async with opened(tmp_path, on_error=errors.append) as (store, _):
            called: list[int] = []
            full_ticket(store, 1)
            store.when_durable(lambda: called.append(1 // 0))
            store.when_durable(lambda: called.append(2))
            await wait_until(lambda: bool(called))
            assert called == [2] and [type(error) for error in errors] == [ZeroDivisionError]

    asyncio.run(run())


def test_writes_of_one_loop_turn_are_one_transaction(tmp_path: Path) -> None:
    """A scalar and its ticket, written together 300 times, are never seen apart."""

    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as ledger:
                for ticket_id in range(1, 301):
                    store.put_ticket(new_ticket(ticket_id))
                    store.put_scalar("issued", ticket_id)
                    await asyncio.sleep(0)
                    (row,) = ledger.execute(
                        "SELECT (SELECT count(*) FROM tickets), (SELECT coalesce(max(value), 0) FROM marks)"
                    )
                    assert row[0] == row[1]
            await durable(store)

    asyncio.run(run())


def test_memory_is_bounded_and_evicted_records_are_read_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, cache_bytes=40_000, segment_bytes=1 << 16) as (store, _):
            tickets = [full_ticket(store, ticket_id) for ticket_id in range(1, 101)]
            assert store.num_bytes > 200_000, "nothing but memory holds them"
            await durable(store)
            assert 0 < store.num_bytes <= 40_000
            for ticket in tickets:
                assert is_whole(store, ticket)
            full_ticket(store, 101)
            await durable(store)
            assert 0 < store.num_bytes <= 40_000
            for ticket in tickets:
                move(store, ticket, State.TRAINED)
                store.release(ticket)
            await durable(store)
            assert store.num_bytes < 40_000

    asyncio.run(run())


def test_segments_are_deleted_unless_retained(tmp_path: Path) -> None:
    async def run(num_tickets: int, *, retain: bool) -> int:
        async with opened(tmp_path, segment_bytes=1 << 16, retain_trajectories=retain) as (store, found):
            trained = list(found.trained)
            for ticket_id in range(found.num_issued + 1, found.num_issued + num_tickets + 1):
                train(store, full_ticket(store, ticket_id), trained)
                await durable(store)
            store.put_scalar("cursor", 1)  # is written after the files of the batch before are deleted
            await durable(store)
            return num_segments(tmp_path)

    assert asyncio.run(run(150, retain=False)) <= 3
    num_retained = asyncio.run(run(100, retain=True))
    assert num_retained >= 5
    num_last = asyncio.run(run(150, retain=False))
    assert num_retained <= num_last <= num_retained + 3, "the next process keeps what an earlier one retained"


def test_an_incomplete_tail_is_removed(tmp_path: Path) -> None:
    async def write(first_id: int) -> None:
        async with opened(tmp_path) as (store, found):
            assert [ticket.ticket_id for ticket in found.tickets] == list(range(1, first_id))
            full_ticket(store, first_id)
            await durable(store)

    asyncio.run(write(1))
    path = segment_path(tmp_path, 0)
    whole = path.read_bytes()
    for ticket_id, tail in ((2, whole[: len(whole) // 3]), (3, whole + whole[:50]), (4, bytes(100))):
        with path.open("ab") as file:
            file.write(tail)
        asyncio.run(write(ticket_id))
    rows = query(tmp_path, "SELECT offset, num_bytes FROM samples ORDER BY offset")
    records = [
        Record.of(ticket_id, index, trajectory_of(ticket_id, index))
        for ticket_id in range(1, 5)
        for index in range(SIZE)
    ]
    assert [size for _, size in rows] == [len(record.data) for record in records]
    assert [offset for offset, _ in rows] == [
        sum(record.num_bytes for record in records[:number]) for number in range(len(rows))
    ]
    assert path.stat().st_size == sum(record.num_bytes for record in records)


def test_damaged_records_are_reported_and_never_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def write() -> None:
        async with opened(tmp_path, segment_bytes=1 << 16) as (store, _):
            for ticket_id in range(1, 41):
                full_ticket(store, ticket_id)
                await durable(store)

    async def read(ticket_id: int) -> None:
        async with opened(tmp_path) as (store, found):
            store.records_of(found.tickets[ticket_id - 1])

    def damage(ticket_id: int) -> Path:
        ((segment, offset, size),) = query(
            tmp_path,
            "SELECT segment, offset, num_bytes FROM samples "
            f"WHERE ticket_id = {ticket_id} AND sample_index = 1",
        )
        path = segment_path(tmp_path, segment)
        with path.open("r+b") as file:
            file.seek(offset + size - 9)
            byte = file.read(1)[0]
            file.seek(offset + size - 9)
            file.write(bytes([byte ^ 1]))
        return path

    asyncio.run(write())
    first, last = damage(1), damage(40)
    assert first != last
    with pytest.raises(StoreCorruptError, match=f"sample 1 of ticket 40 .*{last.name}.* checksum"):
        asyncio.run(read(2))
    damage(40)
    asyncio.run(read(2))
    with pytest.raises(StoreCorruptError, match=f"sample 1 of ticket 1 .*{first.name}.* checksum"):
        asyncio.run(read(1))
    first.unlink()
    with pytest.raises(StoreCorruptError, match=f"ticket 1: its file .*{first.name} is missing.*more"):
        asyncio.run(read(40))

    async def read_the_rest() -> None:
        store = DurableStore(tmp_path, store_settings(), on_error=raising)
        lost = [row[0] for row in query(tmp_path, "SELECT DISTINCT ticket_id FROM samples WHERE segment = 0")]
        assert len(store.recover(ignoring=lost).tickets) == 40
        store.close()

    asyncio.run(read_the_rest())


def test_a_start_looks_once_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counted(directory: Path, segment: int) -> Path:
        looked.append(segment)
        return segment_path(directory, segment)

    async def run() -> None:
        async with opened(tmp_path, segment_bytes=1 << 16) as (store, _):
            for ticket_id in range(1, 40):
                full_ticket(store, ticket_id)
            await durable(store)
        monkeypatch.setattr("buffer.storage.durable.segment_path", counted)
        async with opened(tmp_path, segment_bytes=1 << 16):
            assert sorted(set(looked)) == sorted(looked) and len(looked) == num_segments(tmp_path) > 1

    asyncio.run(run())


def test_a_second_buffer_on_one_ledger_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path):
            with pytest.raises(
                UserError, match=f"in use by another buffer .pid {os.getpid()}.: stop that one"
            ):
                DurableStore(tmp_path, store_settings(), on_error=raising)
        async with opened(tmp_path):
            pass

    asyncio.run(run())


def test_schema_migrations_go_forward_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    later = (*sql.MIGRATIONS, "ALTER TABLE marks ADD COLUMN note TEXT; UPDATE marks SET note = 'old'")

    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            store.put_scalar("cursor", 3)

    asyncio.run(write())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as ledger:
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            sql.migrate(
                ledger,
                path=path,
                migrations=(*sql.MIGRATIONS, "ALTER TABLE marks ADD COLUMN note TEXT; DROP TABLE nowhere"),
            )
        ledger.execute("ROLLBACK")
        assert ledger.execute("SELECT * FROM marks").fetchall() == [("cursor", 3)]
        sql.migrate(ledger, path=path, migrations=later)
        sql.migrate(ledger, path=path, migrations=later)
        assert ledger.execute("SELECT * FROM marks").fetchall() == [("cursor", 3, "old")]
    with pytest.raises(
        UserError,
        match=f"schema version {len(later)}, this program supports up to {len(later) - 1}: run the release",
    ):
        asyncio.run(write())
    path.write_bytes(b"not a ledger at all" * 1000)
    for name in ("ledger.sqlite3-wal", "ledger.sqlite3-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(StoreCorruptError, match="cannot be opened as a ledger"):
        asyncio.run(write())


async def fill_until_blocked(store: DurableStore, *, first_id: int) -> tuple[int, list[int]]:
    """Writes tickets until writes are blocked: (the last id, the ids acknowledged)."""
    acknowledged: list[int] = []
    for ticket_id in range(first_id, first_id + 3000):
        full_ticket(store, ticket_id)
        store.when_durable(lambda ticket_id=ticket_id: acknowledged.append(ticket_id))  # type: ignore[misc]
        if ticket_id % 20 == 0:
            await asyncio.sleep(0.01)
        if store.write_blocked_reason:
            break
    await wait_until(lambda: bool(store.write_blocked_reason))  # the writer's thread may be far behind
    return ticket_id, acknowledged


async def check_recovery(
    store: DurableStore, directory: Path, *, last_id: int, acknowledged: list[int], first_id: int = 1
) -> None:
    """Checks that everything is acknowledged and readable once there is space again."""
    await wait_until(lambda: len(acknowledged) == last_id - first_id + 1)
    assert store.write_blocked_reason == "" and acknowledged == list(range(first_id, last_id + 1))
    for ticket_id in acknowledged:
        assert is_whole(store, new_ticket(ticket_id))
    assert query(directory, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("durability", ["process_crash", "power_loss"])
def test_writes_wait_for_space_on_a_full_disk(tmp_path: Path, durability: str) -> None:
    async def run(disk: Path) -> None:
        filler, ledger = disk / "filler", disk / "ledger"
        filler.write_bytes(bytes(1 << 20))
        settings: dict[str, Any] = {"durability": durability, "cache_bytes": 0, "segment_bytes": 1 << 18}
        async with opened(ledger, **settings) as (store, _):
            last_id, acknowledged = await fill_until_blocked(store, first_id=1)
            assert store.write_blocked_reason.startswith("disk full: ")
            await asyncio.sleep(0.6)
            num_before = len(acknowledged)
            assert 0 < num_before < last_id, "a sample was acknowledged that is not on disk"
            assert store.num_bytes > 0, "unacknowledged records have to stay in memory"
            filler.unlink()
            await check_recovery(store, ledger, last_id=last_id, acknowledged=acknowledged)
        async with opened(ledger, **settings) as (_, found):
            assert [ticket.ticket_id for ticket in found.tickets] == list(range(1, last_id + 1))

    with small_disk(tmp_path / "disk") as disk:
        asyncio.run(run(disk))


def test_exit_on_a_full_disk_keeps_acknowledged_samples(tmp_path: Path) -> None:
    async def run(disk: Path) -> None:
        async with opened(disk / "ledger") as (store, _):
            _, acknowledged = await fill_until_blocked(store, first_id=1)
        (disk / "ledger" / "ledger.sqlite3").stat()
        shutil.copytree(disk / "ledger", tmp_path / "larger")
        async with opened(tmp_path / "larger") as (store, found):
            assert [ticket.ticket_id for ticket in found.tickets][: len(acknowledged)] == acknowledged
            for ticket in found.tickets[: len(acknowledged)]:
                assert is_whole(store, ticket)

    with small_disk(tmp_path / "disk") as disk:
        asyncio.run(run(disk))


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    """Needs no mount: a limit on file sizes applies to the segment or the ledger, whichever grows first."""

    async def run() -> None:
        async with opened(tmp_path, cache_bytes=0) as (store, _):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
            try:
                last_id, acknowledged = await fill_until_blocked(store, first_id=1)
                await asyncio.sleep(0.3)
                assert len(acknowledged) < last_id
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await check_recovery(store, tmp_path, last_id=last_id, acknowledged=acknowledged)

    asyncio.run(run())


def test_min_free_bytes_are_left_on_the_disk(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path, min_free_bytes=1 << 60) as (store, _):
            store.put_ticket(new_ticket(1))
            await durable(store)
            full_ticket(store, 2)
            await wait_until(lambda: bool(store.write_blocked_reason))
            assert "buffer.min_free_bytes keeps" in store.write_blocked_reason
        assert query(tmp_path, "SELECT ticket_id FROM tickets") == [(1,)]

    asyncio.run(run())


def test_releases_are_written_while_samples_wait_for_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with opened(tmp_path, segment_bytes=1 << 16, min_free_bytes=1) as (store, _):
            tickets = [full_ticket(store, ticket_id) for ticket_id in range(1, 200)]
            await durable(store)
            num_before = num_segments(tmp_path)
            monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
            full_ticket(store, 200)
            await wait_until(lambda: bool(store.write_blocked_reason))
            for ticket in tickets:
                move(store, ticket, State.TRAINED)
                store.release(ticket)
            await wait_until(lambda: num_segments(tmp_path) <= 2)
            assert num_before > 4

    asyncio.run(run())


def test_a_hanging_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buffer.storage.writer._HANGS_AFTER_S", 0.1)
    resume, writev = threading.Event(), os.writev

    def hanging(file: int, records: list[bytes]) -> int:
        assert resume.wait()
        return writev(file, records)

    monkeypatch.setattr("os.writev", hanging)

    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            full_ticket(store, 1)
            await wait_until(lambda: "disk hangs: a write in" in store.write_blocked_reason)
            resume.set()
            await durable(store)
            assert store.write_blocked_reason == ""

    asyncio.run(run())


def test_writes_wait_for_a_lock_of_another_program(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as (store, _):
            with contextlib.closing(
                sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)
            ) as shell:
                shell.execute("BEGIN IMMEDIATE")
                full_ticket(store, 1)
                await wait_until(lambda: bool(store.write_blocked_reason))
                assert "another program holds" in store.write_blocked_reason
                shell.execute("ROLLBACK")
            await durable(store)
            assert store.write_blocked_reason == ""

    asyncio.run(run())


def test_the_holder_of_the_ledgers_lock_is_named(tmp_path: Path) -> None:
    database = tmp_path / "ledger.sqlite3"
    assert lock_holder(database, locks="") == "", "there is no ledger"
    shm = tmp_path / "ledger.sqlite3-shm"
    shm.touch()
    inode = shm.stat().st_ino
    others = (
        f"1: POSIX  ADVISORY  WRITE 4711 fe:00:{inode + 1} 120 120\n"
        f"2: POSIX  ADVISORY  READ 4712 fe:00:{inode} 124 124\n"
        f"3: POSIX  ADVISORY  WRITE {os.getpid()} fe:00:{inode} 120 120\n"
        f"3: -> POSIX  ADVISORY  WRITE 4714 fe:00:{inode} 120 120\n"
        f"4: FLOCK  ADVISORY  WRITE 4713 fe:00:{inode} 0 EOF\n"
    )
    assert lock_holder(database, locks=others) == ""
    parent = f"5: POSIX  ADVISORY  WRITE {os.getppid()} fe:00:{inode} 120 120\n"
    assert lock_holder(database, locks=others + parent).startswith(f"pid {os.getppid()} (")


def test_a_failing_disk_ends_the_writer(tmp_path: Path) -> None:
    """A new segment cannot be created: nothing more is acknowledged, and `on_error` is called."""

    async def run() -> None:
        errors: list[Exception] = []
        async with opened(tmp_path, segment_bytes=1 << 16, on_error=errors.append) as (store, _):
            full_ticket(store, 1)
            await durable(store)
            shutil.rmtree(tmp_path / "segments")
            acknowledged: list[int] = []
            for ticket_id in range(2, 60):
                full_ticket(store, ticket_id)
            store.when_durable(lambda: acknowledged.append(1))
            await wait_until(lambda: bool(errors))
            assert isinstance(errors[0], FileNotFoundError) and not acknowledged

    asyncio.run(run())


def test_recovery_does_not_scan_ended_tickets(tmp_path: Path) -> None:
    async def write() -> None:
        async with opened(tmp_path) as (store, _):
            await durable(store)

    asyncio.run(write())
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as ledger:
        statements: list[str] = []
        ledger.set_trace_callback(statements.append)
        sql.read_all(ledger)
        sql.read_locations(ledger)
        ledger.set_trace_callback(None)
        plans = {
            statement: " ".join(row[3] for row in ledger.execute(f"EXPLAIN QUERY PLAN {statement}"))
            for statement in statements
            if " samples" in statement
        }
    assert plans
    for statement, plan in plans.items():
        assert "SCAN samples" not in plan and "tickets_with_arrays" in plan, f"{statement}: {plan}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"durability": "fsync"}, "buffer.durability=fsync: use one of power_loss, process_crash, none"),
        (
            {"durability": "none", "retain_trajectories": True},
            "set buffer.durability to process_crash or power_loss",
        ),
        ({"segment_bytes": 100}, "buffer.segment_bytes=100: use 65536 to 2147483648"),
        ({"min_free_bytes": -1}, "buffer.min_free_bytes must be at least 0"),
    ],
)
def test_invalid_store_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, buffer=settings)
