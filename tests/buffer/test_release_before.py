"""A run of the release before continues with this one.

`release_before/` holds what that release wrote of a small job that was killed in step 15: the configuration,
the ledger as SQL, and its segment file. The newest checkpoint was that of step 12, so steps 12 to 14 are
trained again with the same groups.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from areal_like.config import Config
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, StartTraining
from launch.audit.run import audit_run
from tests.support.buffer_harness import ROOT, BufferProcess, FakeTrainer, connected, trainer_hello
from tests.support.quick import only_in_chaos
from tests.support.waiting import HANG_LIMIT_S

SAVED = Path(__file__).with_name("release_before")
RESUMED, RECORDED, LAST = 12, 15, 18
"""Step of the newest checkpoint; first step that was not whole; first step that is not trained here."""


@pytest.fixture(params=[*only_in_chaos("wait"), "close"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """The run of the release before, in a directory of its own, with an empty model, under its own rule for
    overdue groups or under the new one."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    settings = [f"runs_dir={tmp_path}/runs", f"model.path={model}", f"buffer.overdue={request.param}"]
    config = load_config(["--config", str(SAVED / "config.yaml"), *settings])
    segments = RunPaths.of(config).ledger / "segments"
    segments.mkdir(parents=True)
    (segments / "000000.seg").write_bytes(gzip.decompress((SAVED / "000000.seg.gz").read_bytes()))
    with ledger_of(config) as connection:
        connection.executescript((SAVED / "ledger.sql").read_text())
    return config


@contextmanager
def ledger_of(config: Config) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(RunPaths.of(config).ledger / "ledger.sqlite3", timeout=600)) as connection:
        yield connection


def recorded_tickets(config: Config) -> list[tuple[int, int, int]]:
    """(step, position, ticket) of every recorded group from the checkpoint on."""
    query = "SELECT step, position, ticket_id FROM tickets WHERE step >= ? ORDER BY step, position"
    with ledger_of(config) as connection:
        return list(connection.execute(query, (RESUMED,)))


def test_a_run_of_the_release_before_continues(config: Config) -> None:
    with ledger_of(config) as connection:
        marks = dict(connection.execute("SELECT name, value FROM marks"))
    recorded = recorded_tickets(config)
    buffer = BufferProcess(config)
    producer = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.chaos.producer", "rollout-0", "64", "0.002", "8"),
            *("--config", str(buffer.paths.config), f"buffer.port={buffer.address.rpartition(':')[2]}"),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    async def train() -> list[tuple[int, int, int]]:
        async with connected(buffer) as link:
            welcome = await link.call(trainer_hello(config), timeout_s=HANG_LIMIT_S)
            assert welcome.incarnation == marks["incarnation:trainer-0"] + 1
            trainer = FakeTrainer(config, link)
            await trainer.call(StartTraining(step=RESUMED))
            served = []
            for step in range(RESUMED, LAST):
                groups = await trainer.train(step)
                served += [(group.step, group.position, group.ticket_id) for group in groups]
                assert all(len(group.trajectories) == config.sampling.group_size for group in groups)
                await trainer.call(AllocVersion(step=step + 1))
            await trainer.call(CommitStep(step=LAST - 1))
        return served

    try:
        served = asyncio.run(train())
        assert len(recorded) == 13, "three whole steps and one group of the next"
        assert served[: len(recorded)] == recorded, "the groups that were recorded are served again"
        status = buffer.status()
        assert status["committed_steps"] == LAST and status["counters"]["leases_lost"] >= 1
        assert buffer.terminate()[0] == 0
    finally:
        producer.kill()
        producer.wait()
        buffer.close()
    audit = audit_run(RunPaths.of(config).root)
    assert audit.is_clean, "\n".join(audit.lines())
