"""Measures the CPU time per sample in a ledger with many old tickets: ledger and store, without sockets.

The CPU time of the store's writer thread is included. The old tickets are written with SQL in their final
state (trained, released, their rows kept forever), because training a million tickets would take too long.
The ledger is then recovered, and new steps are run.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.paths import RunPaths
from areal_like.wire.messages.producer import SampleDone, ServerHeartbeat, ServerState
from areal_like.wire.records import Record
from benchmarks.stream_peers.load import trajectories
from benchmarks.stream_peers.ours import GROUP_SIZE, GROUPS_PER_STEP, config_of
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.base import Store
from buffer.storage.durable import open_store

NUM_STEPS = 24
COMMIT_EVERY = 8


async def cost(
    directory: Path, *, num_tickets: int, num_tokens: int = 64, durability: str = "process_crash"
) -> dict[str, Any]:
    """Microseconds of CPU of one insert and one read, seconds to open, bytes of the ledger's file."""
    config = config_of(directory, durability=durability, backlog=8192)
    paths = RunPaths.of(config)
    # Opening makes the tables.
    with contextlib.closing(_open(config)[1]):
        pass
    _write_old_tickets(paths.ledger / "ledger.sqlite3", num_tickets)
    started_s = time.monotonic()
    ledger, store = _open(config)
    open_s = time.monotonic() - started_s
    try:
        inserted_s, read_s = await _run_steps(ledger, store, num_tokens=num_tokens)
    finally:
        store.close()
    num_samples = NUM_STEPS * GROUPS_PER_STEP * GROUP_SIZE
    return {
        "tickets": num_tickets,
        "insert_us": round(1e6 * inserted_s / num_samples, 1),
        "read_us": round(1e6 * read_s / num_samples, 1),
        "open_s": round(open_s, 3),
        "ledger_bytes": (paths.ledger / "ledger.sqlite3").stat().st_size,
    }


def _open(config: Config) -> tuple[Ledger, Store]:
    def fail(error: Exception) -> None:
        raise error

    store = open_store(config, on_error=fail)
    return recover(LedgerSettings.from_config(config), store, now_s=0.0, dataset=1), store


def _write_old_tickets(file: Path, num_tickets: int) -> None:
    """Writes whole steps of trained and released tickets, and the scalars that go with them."""
    num_steps = num_tickets // GROUPS_PER_STEP
    last = num_steps * GROUPS_PER_STEP
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {last}) "
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        columns = {
            "ticket_id": "i + 1", "purpose": "'train'", "prompt_index": "i", "num_samples": GROUP_SIZE,
            "parent": 0, "num_reissues": 0, "eval_id": 0, "max_staleness": 15, "state": "'trained'",
            "step": f"i / {GROUPS_PER_STEP}", "position": f"i % {GROUPS_PER_STEP}", "num_greedy": 0,
            "released": 1,
        }  # fmt: skip
        names, values = ", ".join(columns), ", ".join(map(str, columns.values()))
        connection.execute(f"INSERT INTO tickets ({names}) {numbers} SELECT {values} FROM n")
        connection.execute(
            "INSERT INTO samples (ticket_id, sample_index, lease_id, oldest_step, sum_token_steps, "
            "oldest_version, newest_version, num_sampled, reward, segment, offset, num_bytes, crc32) "
            "SELECT ticket_id, value, ticket_id, step, 0, 0, 0, 1, 1.0, 0, 0, 0, 0 "
            f"FROM tickets, json_each('{list(range(GROUP_SIZE))}')"
        )
        marks = {
            "trainer_step": num_steps,
            "committed_step": num_steps - 1,
            "oldest_kept_step": num_steps,
            "trainer_incarnation": 1,
        }
        connection.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?)", marks.items())


async def _run_steps(ledger: Ledger, store: Store, *, num_tokens: int) -> tuple[float, float]:
    """Runs NUM_STEPS steps; returns the CPU seconds of inserting and of reading."""
    first_step = ledger.state.steps.current
    ledger.state.prompts.set_num_train_prompts(1_000_000)
    ledger.trainer.start_training(incarnation=2, step=first_step, stream={})
    version = ledger.trainer.alloc_version(incarnation=2, step=first_step)
    ledger.dispatcher.register_server("rollout-0", incarnation=1, weights_version=version, now_s=0.0)
    inserted_s = read_s = 0.0
    for step in range(first_step, first_step + NUM_STEPS):
        samples = trajectories(num_tokens, count=GROUP_SIZE, version=version)
        started_s = time.process_time()
        _beat(ledger, version)
        leases = ledger.dispatcher.grant(now_s=0.0).get("rollout-0", [])
        inserted_s += time.process_time() - started_s
        finished = [
            [
                SampleDone(lease_id=lease.lease_id, record=Record.of(lease.ticket_id, index, samples[index]))
                for index in lease.sample_indices
            ]
            for lease in leases
        ]
        started_s = time.process_time()
        for group in finished:
            refusals = [
                verdict for verdict in ledger.intake.samples_done("rollout-0", group) if verdict.refusal
            ]
            assert not refusals, refusals
        durable = asyncio.get_running_loop().create_future()
        store.when_durable(lambda done=durable: done.set_result(None))  # type: ignore[misc]
        await durable
        inserted_s += time.process_time() - started_s
        started_s = time.process_time()
        for position in range(GROUPS_PER_STEP):
            assert ledger.trainer.fetch(step=step, position=position) is not None
        read_s += time.process_time() - started_s
        ledger.trainer.complete_step(incarnation=2, step=step)
        version = ledger.trainer.alloc_version(incarnation=2, step=step + 1)
        if (step + 1) % COMMIT_EVERY == 0:
            ledger.trainer.commit(incarnation=2, step=step, oldest_kept_step=step + 1)
    return inserted_s, read_s


def _beat(ledger: Ledger, version: int) -> None:
    beat = ServerHeartbeat(
        state=ServerState.SERVING,
        free_samples=GROUP_SIZE * GROUPS_PER_STEP,
        holding_samples=0,
        weights_version=version,
        leases=[],
    )
    ledger.dispatcher.heartbeat("rollout-0", beat, now_s=0.0)
