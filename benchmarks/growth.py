"""Measures how a buffer's memory and its ledger's files grow with the number of tickets.

The real ledger and the real durable store in one process, with synthetic rollout servers and a synthetic
trainer; no sockets and no model. Every call that a run makes to the ledger is made: leases, samples, fetches,
steps, weight versions, commits. Some samples fail, an evaluation is requested every `_EVAL_EVERY` steps, and
a server is replaced every `_REPLACE_EVERY` steps, occasionally by one with a new name, as in a pool that is
scaled. Records are small, because only the newest are kept; the rows are what grows.

    python -m benchmarks.growth [--tickets 1000000] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_like.config import Config, from_mapping
from areal_like.failures import FailureKind
from areal_like.paths import RunPaths
from areal_like.runtime.freed_memory import resident_bytes
from areal_like.wire.messages.producer import Lease, SampleDone, SampleFailed, ServerHeartbeat, ServerState
from areal_like.wire.records import Record
from benchmarks import report
from benchmarks.stream_peers.load import trajectories
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.base import Store
from buffer.storage.durable import open_store

_GROUP_SIZE, _GROUPS_PER_STEP = 8, 64
_COMMIT_EVERY, _EVAL_EVERY, _REPLACE_EVERY = 8, 50, 20
_NUM_SERVERS, _NUM_TOKENS = 8, 32
_FAIL_EVERY = 997
"""One of this many samples fails and is sampled again."""
_NEW_NAME_EVERY = 5
"""In one of this many replacements the new server has a new name."""
_GROWING = ("rss_mb", "sqlite_mb", "segments_mb", "versions", "names", "evaluations", "live_tickets")


def main(argv: list[str] | None = None) -> int:
    """Prints a table and writes benchmarks/results/growth.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tickets", type=int, default=1_000_000)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=10, help="rows of the table")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="areal-like-growth-", dir=args.scratch) as folder:
        result = asyncio.run(measure(Path(folder), num_tickets=args.tickets, num_rows=args.rows))
    rows = result["rows"]
    names = list(rows[0])
    sys.stdout.write(f"{report.table(names, [[row[name] for name in names] for row in rows])}\n")
    for name, value in result.items():
        if name != "rows":
            sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write(f"{report.write('growth', result)}\n")
    return 0


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth of each figure per million tickets over the second half of the run, when caches are full."""
    first, last = rows[(len(rows) - 1) // 2], rows[-1]
    millions = (last["tickets"] - first["tickets"]) / 1e6
    return {name: round((last[name] - first[name]) / millions, 1) for name in _GROWING}


async def measure(directory: Path, *, num_tickets: int, num_rows: int) -> dict[str, Any]:
    """The figures after each of `num_rows` equal parts of the run."""
    config = from_mapping(
        {
            "name": "growth",
            "runs_dir": str(directory),
            "max_staleness": 4,
            "sampling": {"group_size": _GROUP_SIZE},
            "trainer": {"num_steps": 1_000_000_000, "groups_per_step": _GROUPS_PER_STEP},
            "eval": {"num_prompts": 0},
        }
    )
    ledger, store = _open(config)
    rows: list[dict[str, Any]] = []
    try:
        job = _Job(ledger, store)
        for mark in (num_tickets * (part + 1) // num_rows for part in range(num_rows)):
            started_s, before = time.process_time(), ledger.state.tickets.num_issued
            while ledger.state.tickets.num_issued < mark:
                await job.step()
            num_new = ledger.state.tickets.num_issued - before
            cpu_us = 1e6 * (time.process_time() - started_s) / max(1, num_new * _GROUP_SIZE)
            rows.append(_figures(config, ledger) | {"cpu_us_a_sample": round(cpu_us, 1)})
            sys.stderr.write(f"{rows[-1]}\n")
    finally:
        store.close()
    started_s = time.monotonic()
    again, store = _open(config)
    open_s = round(time.monotonic() - started_s, 2)
    assert again.state.tickets.num_issued == ledger.state.tickets.num_issued
    store.close()
    return {
        "rows": rows,
        "a_million_tickets": slopes(rows),
        "mb_by_table": _mb_by_table(RunPaths.of(config).ledger / "ledger.sqlite3"),
        "open_s": open_s,
    }


def _open(config: Config) -> tuple[Ledger, Store]:
    def fail(error: Exception) -> None:
        raise error

    store = open_store(config, on_error=fail)
    return recover(LedgerSettings.from_config(config), store, now_s=0.0, dataset=1), store


class _Job:
    """Servers and trainer whose work takes no time."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self._ledger, self._store = ledger, store
        self._names = [f"rollout-{index}" for index in range(_NUM_SERVERS)]
        self._numbers = itertools.count(_NUM_SERVERS)
        self._samples = itertools.count()
        self._step = 0
        self._now_s = 0.0
        ledger.state.prompts.set_num_train_prompts(1_000_000)
        ledger.trainer.start_training(incarnation=1, step=0, stream={})
        self._version = ledger.trainer.alloc_version(incarnation=1, step=0)
        for name in self._names:
            self._register(name)

    async def step(self) -> None:
        """One optimizer step with everything that belongs to it."""
        ledger, step = self._ledger, self._step
        self._now_s += 1.0
        assert not ledger.dispatcher.expire(now_s=self._now_s), "a server was lost"
        assert not ledger.state.leases.take_aborts(), "a lease was lost"
        if step % _EVAL_EVERY == 0:
            ledger.trainer.request_eval(eval_id=step, num_prompts=64, min_version=0, num_samples=1)
        if step % _REPLACE_EVERY == _REPLACE_EVERY - 1:
            number = step // _REPLACE_EVERY
            self._replace(number % _NUM_SERVERS, is_new=number % _NEW_NAME_EVERY == 0)
        while any(ledger.trainer.fetch(step=step, position=each) is None for each in range(_GROUPS_PER_STEP)):
            for name in self._names:
                self._beat(name)
            for name, leases in ledger.dispatcher.grant(now_s=self._now_s).items():
                for lease in leases:
                    self._answer(name, lease)
            await self._durable()
        ledger.trainer.complete_step(incarnation=1, step=step)
        self._step = step + 1
        self._version = ledger.trainer.alloc_version(incarnation=1, step=self._step)
        if self._step % _COMMIT_EVERY == 0:
            ledger.trainer.commit(
                incarnation=1, step=step, oldest_kept_step=max(0, self._step - _COMMIT_EVERY)
            )
        await self._durable()

    def _answer(self, name: str, lease: Lease) -> None:
        made = trajectories(_NUM_TOKENS, count=len(lease.sample_indices), version=self._version)
        done = []
        for index, sample in zip(lease.sample_indices, made, strict=True):
            if next(self._samples) % _FAIL_EVERY == _FAIL_EVERY - 1:
                failed = SampleFailed(
                    lease_id=lease.lease_id,
                    ticket_id=lease.ticket_id,
                    sample_index=index,
                    kind=FailureKind.ENGINE,
                    num_tokens=3,
                    error="synthetic",
                )
                self._ledger.intake.sample_failed(name, failed)
            else:
                done.append(
                    SampleDone(lease_id=lease.lease_id, record=Record.of(lease.ticket_id, index, sample))
                )
        refusals = [verdict for verdict in self._ledger.intake.samples_done(name, done) if verdict.refusal]
        assert not refusals, refusals

    def _replace(self, place: int, *, is_new: bool) -> None:
        name = self._names[place]
        self._ledger.dispatcher.remove_server(name)
        if is_new:
            self._names[place] = name = f"rollout-{next(self._numbers)}"
        self._register(name)

    def _register(self, name: str) -> None:
        incarnation = self._ledger.admit_process(name, f"{name} {self._step}")
        self._ledger.dispatcher.register_server(
            name, incarnation=incarnation, weights_version=self._version, now_s=self._now_s
        )

    def _beat(self, name: str) -> None:
        beat = ServerHeartbeat(
            state=ServerState.SERVING,
            free_samples=_GROUP_SIZE * _GROUPS_PER_STEP // _NUM_SERVERS,
            holding_samples=0,
            weights_version=self._version,
            leases=[],
        )
        self._ledger.dispatcher.heartbeat(name, beat, now_s=self._now_s)

    async def _durable(self) -> None:
        durable = asyncio.get_running_loop().create_future()
        self._store.when_durable(lambda: durable.set_result(None))
        await durable


def _figures(config: Config, ledger: Ledger) -> dict[str, Any]:
    gc.collect()
    state, directory = ledger.state, RunPaths.of(config).ledger
    return {
        "tickets": state.tickets.num_issued,
        "rss_mb": round(resident_bytes() / 1e6, 1),
        "sqlite_mb": round((directory / "ledger.sqlite3").stat().st_size / 1e6, 1),
        "wal_mb": round((directory / "ledger.sqlite3-wal").stat().st_size / 1e6, 1),
        "segments_mb": round(sum(_sizes(directory / "segments")) / 1e6, 1),
        "num_segments": len(list(_sizes(directory / "segments"))),
        "live_tickets": len(state.tickets.live),
        "versions": len(state.versions._weights),
        "names": len(state.incarnations._newest),
        "evaluations": len(state.evals.rounds),
    }


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.glob("*.seg"):
        with contextlib.suppress(FileNotFoundError):
            yield path.stat().st_size


def _mb_by_table(path: Path) -> dict[str, float]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY 1 ORDER BY 2 DESC")
        return {name: round(num_bytes / 1e6, 2) for name, num_bytes in found if num_bytes >= 1e4}


if __name__ == "__main__":
    sys.exit(main())
