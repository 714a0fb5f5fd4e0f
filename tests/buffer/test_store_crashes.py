"""The durable store under SIGKILL at any moment, and on a disk that loses what was not synced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from areal_like.wire.records import RecordLocation, read_record
from buffer.storage.base import Recovered
from buffer.storage.durable import DurableStore
from tests.support.buffer_harness import ROOT
from tests.support.lost_writes import Disk, compile_shim, read_log
from tests.support.store_load import KEPT, SIZE, is_same, raising, store_settings, trajectory_of

NUM_KILLS = 20
NUM_POWER_LOSSES = 15


def start_load(
    directory: Path, *, durability: str, num_tickets: int, **environment: str
) -> subprocess.Popen[bytes]:
    """`tests.support.store_load` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.store_load", str(directory), durability, str(num_tickets)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
    )


def parse_acks(output: bytes) -> set[tuple[int, int]]:
    """(ticket id, sample index) of every complete line."""
    whole = output[: output.rfind(b"\n") + 1].decode().split()
    return set(zip(map(int, whole[::2]), map(int, whole[1::2]), strict=True))


def open_once(directory: Path, *, durability: str) -> Recovered:
    """The rows that a new process would recover."""

    async def recover() -> Recovered:
        store = DurableStore(directory, store_settings(durability=durability), on_error=raising)
        try:
            return store.recover()
        finally:
            store.close()

    return asyncio.run(recover())


def check(directory: Path, acknowledged: set[tuple[int, int]], *, durability: str) -> int:
    """Checks that every acknowledged sample exists once and unchanged, and that no transaction is partial.

    Returns the number of trained tickets.
    """
    recovered = open_once(directory, durability=durability)
    with contextlib.closing(sqlite3.connect(directory / "ledger.sqlite3")) as ledger:
        rows = ledger.execute(
            "SELECT ticket_id, sample_index, released, segment, offset, num_bytes, crc32 "
            "FROM samples JOIN tickets USING (ticket_id)"
        )
        found = {
            (ticket_id, index): (released, RecordLocation(*location))
            for ticket_id, index, released, *location in rows
        }
        trained = [
            row[0]
            for row in ledger.execute("SELECT ticket_id FROM tickets WHERE state = 'trained' ORDER BY 1")
        ]
        (num_samples,) = ledger.execute("SELECT count(*) FROM samples").fetchone()
        (integrity,) = ledger.execute("PRAGMA integrity_check").fetchone()
    assert integrity == "ok" and num_samples == len(found)
    assert not (lost := acknowledged - found.keys()), f"acknowledged and lost: {sorted(lost)}"
    for (ticket_id, index), (released, location) in found.items():
        if not released:
            record = read_record(
                directory, location, ticket_id=ticket_id, sample_index=index, with_routes=True
            )
            assert is_same(record.trajectory(), trajectory_of(ticket_id, index)), (
                f"sample {index} of ticket {ticket_id} differs from the one written"
            )
    assert trained == list(range(1, len(trained) + 1))
    assert recovered.scalars.get("committed_step", 0) == len(trained), "a transaction was written in part"
    assert len(recovered.trained) == min(KEPT, len(trained))
    assert all(len(ticket.samples) == SIZE for ticket in recovered.trained)
    return len(trained)


def kill_in_mid_load(directory: Path, *, rng: random.Random) -> set[tuple[int, int]]:
    """Kills a load at a random moment; returns the samples that it acknowledged."""
    process = start_load(directory, durability="process_crash", num_tickets=10**6)
    assert process.stdout is not None
    num_bytes, output = rng.randrange(4_000), b""
    while len(output) <= num_bytes:
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        assert chunk, "the load ended by itself"
        output += chunk
    # In the other half of the cases the process is killed while the pipe still contains acknowledgements.
    if rng.random() < 0.5:
        select.select([process.stdout], [], [], 0)
        time.sleep(rng.random() * 0.01)
    process.kill()
    output += process.stdout.read()
    process.stdout.close()
    process.wait()
    return parse_acks(output)


def kills(directory: Path, *, num_kills: int, seed: int) -> None:
    """Kills one process after another; each continues from the files of the one before."""
    rng = random.Random(seed)
    acknowledged: set[tuple[int, int]] = set()
    num_trained = [0]
    for _ in range(num_kills):
        acknowledged |= kill_in_mid_load(directory, rng=rng)
        num_trained.append(check(directory, acknowledged, durability="process_crash"))
    assert num_trained == sorted(num_trained) and num_trained[-1] > num_kills
    assert len(list((directory / "segments").glob("*.seg"))) < 6, "released trajectories were not deleted"


@pytest.mark.chaos
def test_sigkill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Long, because writers are killed at many moments."""
    kills(tmp_path / "ledger", num_kills=NUM_KILLS, seed=1)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_sigkill_at_200_points_loses_nothing(tmp_path: Path) -> None:
    kills(tmp_path / "ledger", num_kills=200, seed=2)


def lose_power(tmp_path: Path, *, num_points: int, seed: int) -> None:
    """Records two processes, the first killed, and simulates a power loss at random points of the log."""
    try:
        shim = compile_shim(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"{error}: the shim that sees fsyncs cannot be built")
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    environment = {"LD_PRELOAD": str(shim), "SHIM_DIRECTORY": str(ledger), "SHIM_LOG": str(log)}
    for num_tickets, is_killed in ((10**6, True), (150, False)):
        process = start_load(ledger, durability="power_loss", num_tickets=num_tickets, **environment)
        assert process.stdout is not None
        while is_killed and process.stdout.read(500) and log.stat().st_size < 3 << 20:
            pass
        if is_killed:
            process.kill()
        process.stdout.read()
        process.stdout.close()
        process.wait()
    ops = read_log(log)
    rng = random.Random(seed)
    acknowledging = [number for number, op in enumerate(ops) if op.kind == "A"]
    # Half of the points directly follow different acknowledgements; the others are anywhere.
    points = [number + 1 for number in rng.sample(acknowledging, min(num_points // 2, len(acknowledging)))]
    points += [rng.randrange(acknowledging[0], len(ops)) for _ in range(num_points - len(points))]
    disk, at, num_acknowledged = Disk(ledger), 0, []
    for point in sorted(points):
        disk.play(ops[at:point])
        at = point
        acknowledged = parse_acks(b"".join(op.data for op in ops[:point] if op.kind == "A"))
        num_acknowledged.append(len(acknowledged))
        for chance in (0.0, rng.random(), 1.0):
            into = tmp_path / "after"
            disk.lose_power(into, survives=lambda chance=chance: rng.random() < chance, rng=rng)
            check(into, acknowledged, durability="power_loss")
            shutil.rmtree(into)
    assert num_acknowledged[-1] > 200 and len(set(num_acknowledged)) >= min(
        num_points // 2, len(acknowledging)
    )


def test_power_loss_loses_nothing_acknowledged(tmp_path: Path) -> None:
    lose_power(tmp_path, num_points=NUM_POWER_LOSSES, seed=3)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_power_loss_at_1000_points_loses_nothing(tmp_path: Path) -> None:
    lose_power(tmp_path, num_points=1000, seed=4)


def test_power_loss_without_fsync_is_detected_by_the_shim(tmp_path: Path) -> None:
    """Without fsyncs before acknowledgements a power loss must lose rows, so the tests above can fail."""
    try:
        shim = compile_shim(tmp_path)
    except FileNotFoundError as error:
        pytest.skip(f"{error}: the shim that sees fsyncs cannot be built")
    ledger, log = tmp_path / "ledger", tmp_path / "log"
    environment = {"LD_PRELOAD": str(shim), "SHIM_DIRECTORY": str(ledger), "SHIM_LOG": str(log)}
    process = start_load(ledger, durability="process_crash", num_tickets=20, **environment)
    process.communicate()
    ops = read_log(log)
    last = max(number for number, op in enumerate(ops) if op.kind == "A") + 1
    disk = Disk(ledger)
    disk.play(ops[:last])
    disk.lose_power(tmp_path / "after", survives=lambda: False, rng=random.Random(0))
    acknowledged = parse_acks(b"".join(op.data for op in ops[:last] if op.kind == "A"))
    with pytest.raises(AssertionError, match="acknowledged and lost"):
        check(tmp_path / "after", acknowledged, durability="process_crash")
