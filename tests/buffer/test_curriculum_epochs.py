"""Curricula over a small file: the ledger plays many epochs of rows that are easy, middling or impossible."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import BufferConfig
from areal_like.wire.messages.producer import Lease
from buffer.ledger.recovery import recover
from buffer.prompts.curriculum import Curriculum
from buffer.prompts.order import PromptOrder, PromptSet
from buffer.storage.durable import DurableStore
from tests.support.ledger_simulation import add_server, beat, deliver, done, ledger_settings, new_ledger
from tests.support.store_load import raising, store_settings

NUM_ROWS = 30
GROUP_SIZE = 4


def solve_rate(row: int) -> float:
    """Rows 0-9 are impossible, rows 10-19 always solved, the rest are solved by half of the samples."""
    return (0.0, 1.0, 0.5)[row // 10]


class Play:
    """A job over `NUM_ROWS` rows on a ledger on disk, one group a step."""

    def __init__(self, directory: Path, *, num_steps: int = 400, **changes: Any) -> None:
        self._directory = directory
        self._settings = ledger_settings(
            groups_per_step=1,
            group_size=GROUP_SIZE,
            num_steps=num_steps,
            max_staleness=2,
            durable=True,
            **changes,
        )
        self.issued: list[int] = []
        """Rows of all new tickets, in order."""
        self._last_ticket = 0
        self._incarnation = 0
        self.open()

    def open(self, *, num_rows: int = NUM_ROWS, dataset: int = 7) -> None:
        """A buffer and a trainer start on what is on the disk."""
        self._store = DurableStore(self._directory, store_settings(), on_error=raising)
        self.ledger = recover(self._settings, self._store, now_s=0.0, dataset=dataset)
        self.ledger.state.prompts.set_num_train_prompts(num_rows)
        self._incarnation += 1
        self.ledger.trainer.start_training(
            incarnation=self._incarnation, step=self.ledger.state.steps.committed + 1, stream={}
        )
        self._version = self.ledger.state.versions.newest

    def close(self) -> None:
        """The buffer dies; everything acknowledged is on the disk."""
        self._store.close()

    @property
    def curriculum(self) -> Curriculum:
        """The ledger's, which must have one."""
        assert self.ledger.state.prompts.curriculum is not None
        return self.ledger.state.prompts.curriculum

    def steps(self, count: int) -> None:
        """Generates what the ledger grants, and trains this many steps."""
        for _ in range(count):
            step = self.ledger.state.steps.current
            while self.ledger.trainer.fetch(step=step, position=0) is None:
                self._generate()
            self.ledger.trainer.complete_step(incarnation=self._incarnation, step=step)
            self._version = self.ledger.trainer.alloc_version(incarnation=self._incarnation, step=step + 1)
            self.ledger.trainer.commit(incarnation=self._incarnation, step=step, oldest_kept_step=step + 1)

    def _generate(self) -> None:
        add_server(
            self.ledger, "a", capacity=GROUP_SIZE, version=self._version, incarnation=self._incarnation
        )
        for lease in self.ledger.dispatcher.grant(now_s=0.0).get("a", []):
            if lease.ticket_id > self._last_ticket:
                self.issued.append(lease.prompt_index)
                self._last_ticket = lease.ticket_id
            for index in lease.sample_indices:
                deliver(self.ledger, "a", done(lease, index, [self._version], reward=_reward(lease, index)))


def _reward(lease: Lease, index: int) -> float:
    """The same for the same sample of the same ticket, in every process."""
    return float(random.Random(f"{lease.ticket_id}/{index}").random() < solve_rate(lease.prompt_index))


def shares(issued: list[int]) -> list[float]:
    """Shares of issued groups that were impossible, always solved and in between."""
    counts = Counter(row // 10 for row in issued)
    return [counts[kind] / len(issued) for kind in range(3)]


@pytest.mark.parametrize("kind", ["goldilocks", "paced"])
@pytest.mark.parametrize("group_filter", ["none", "spread"])
def test_later_epochs_use_the_evidence_of_earlier_ones(tmp_path: Path, kind: str, group_filter: str) -> None:
    async def play() -> list[int]:
        job = Play(tmp_path, curriculum=kind, group_filter=group_filter)
        job.steps(160)
        job.close()
        return job.issued

    issued = asyncio.run(play())
    num_epochs = len(issued) * 4 / NUM_ROWS
    assert num_epochs > 20
    later = issued[len(issued) // 3 :]
    impossible, always, between = shares(later)
    assert between > 0.6 > 0.25 > max(impossible, always), "a third each without a curriculum"
    # Exploration: no row is given up, however often it has failed.
    assert set(range(10)) <= set(issued) and set(range(10, 20)) <= set(issued)


def test_a_buffer_that_dies_in_an_epoch_continues_its_stream(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"curriculum": "goldilocks", "group_filter": "spread"}

    async def play(directory: Path, *stretches: int) -> tuple[list[int], list[int]]:
        job = Play(directory, **settings)
        for number, count in enumerate(stretches):
            if number:
                job.close()
                job.open()
            job.steps(count)
        state = job.curriculum.state()
        job.close()
        return job.issued, state

    whole, state = asyncio.run(play(tmp_path / "whole", 90))
    pieces, resumed_state = asyncio.run(play(tmp_path / "pieces", 7, 24, 1, 58))
    assert pieces == whole and resumed_state == state
    assert len(whole) % (NUM_ROWS // 4), "the stretches do not end with an epoch"


def test_another_file_forgets_the_evidence(tmp_path: Path) -> None:
    async def play() -> None:
        job = Play(tmp_path, curriculum="goldilocks")
        job.steps(40)
        job.close()
        before = job.curriculum.state()
        assert len(before) > 4
        job.open(num_rows=NUM_ROWS // 2, dataset=8)
        assert job.curriculum.state() == Curriculum(BufferConfig(curriculum="goldilocks")).state()
        job.issued.clear()
        job.steps(40)
        assert set(job.issued) <= set(range(NUM_ROWS // 2)), "a row of the old file was issued"
        job.close()

    asyncio.run(play())


def test_small_files_and_odd_pools_reach_every_row(tmp_path: Path) -> None:
    async def play(pool: int, num_rows: int) -> list[int]:
        job = Play(
            tmp_path / f"{pool}-{num_rows}",
            curriculum="paced",
            curriculum_pool=pool,
            curriculum_exploration=0.5,
        )
        job.close()
        job.open(num_rows=num_rows, dataset=9)
        job.steps(120)
        job.close()
        return job.issued

    for pool, num_rows in ((7, 5), (4, 1), (3, 10)):
        assert set(asyncio.run(play(pool, num_rows))) == set(range(num_rows)), (pool, num_rows)


def test_the_log_tells_when_no_group_has_spread(tmp_path: Path) -> None:
    ledger = new_ledger(group_filter="spread", num_steps=1000)
    add_server(ledger, "a", capacity=4)

    def play(num_groups: int, *, spread: bool) -> list[str]:
        told = []
        for _ in range(num_groups):
            beat(ledger, "a", capacity=4)
            lease = ledger.dispatcher.grant(now_s=0.0)["a"][0]
            for index in lease.sample_indices:
                deliver(ledger, "a", done(lease, index, [0], reward=float(spread and index)))
            told += ledger.take_notices()
        return told

    assert play(255, spread=False) == [] == play(1, spread=True) == play(255, spread=False)
    assert "dropped 256 groups in a row" in play(1, spread=False)[0]
    assert play(255, spread=False) == [] and "dropped 512 groups" in play(1, spread=False)[0]
    assert play(511, spread=False) == [] and "dropped 1024 groups" in play(1, spread=False)[0]


def test_a_curriculum_keeps_the_weights_of_a_mixture() -> None:
    """Two tasks with weights 3 and 1: rows 0-29 are the first one, and the second has middle rows only."""
    core = Curriculum(BufferConfig(curriculum="goldilocks"))
    order = PromptOrder(seed=4, num_prompts=40, curriculum=core)
    order.sources = (PromptSet(size=30, weight=3.0), PromptSet(size=10, weight=1.0))
    rng = random.Random(0)
    issued = []
    for _ in range(1200):
        issued.append(order.next().index)
        rate = solve_rate(min(issued[-1], 29))
        core.observe(issued[-1], [float(rng.random() < rate) for _ in range(GROUP_SIZE)])
    for start in range(0, 1000, 50):
        of_first = sum(row < 30 for row in issued[start : start + 200])
        assert abs(of_first / 200 - 0.75) <= 0.02, start
    impossible, always, between = shares([row for row in issued[300:] if row < 30])
    assert between > 0.6 > 0.25 > max(impossible, always), "it chooses within the task that is drawn"
    assert set(issued) == set(range(40))
