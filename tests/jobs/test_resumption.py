"""Whole jobs whose buffer and trainer are killed, with the real daemons: nothing lost, nothing twice, the same weights to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.launching import areal_like, launcher, num_steps_done, processes_of, wait_until
from tests.support.small_disk import small_disk

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=20",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "eval.num_prompts=0",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=10",
    "max_staleness=2",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The run's directory."""
    return tmp_path / "runs" / "x"


def query(root: Path, sql: str) -> list[tuple[object, ...]]:
    """Rows of the ledger, which may be in use."""
    path = root / "ledger" / "ledger.sqlite3"
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
        return connection.execute(sql).fetchall()


def places(root: Path) -> dict[tuple[object, object], object]:
    """(step, position) -> ticket id, of everything that was recorded and not dropped."""
    rows = query(root, "SELECT step, position, ticket_id FROM tickets WHERE state IN ('batched', 'trained')")
    assert len({row[:2] for row in rows}) == len(rows), "two groups in one place"
    return {(step, position): ticket_id for step, position, ticket_id in rows}


def pid_of(root: Path, part: str) -> int:
    """The daemon whose command line contains this."""
    return next(pid for pid, command in processes_of(root).items() if part in command)


def command(*words: str, cwd: Path) -> str:
    """`areal-like WORDS`, which must succeed."""
    run = areal_like(*words, cwd=cwd)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_trainer_killed_at_each_point_ends_with_the_weights_of_an_unbroken_run(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    deaths = ["update:5", "save:7", "commit:11"]
    settings = (
        *SMALL,
        "trainer.num_steps=16",
        "trainer.checkpoint_interval=4",
        "buffer.retain_trajectories=true",
        "objective._target_=tests.support.fault_points.Doomed",
        f"objective.folder={tmp_path}",
        f"objective.deaths='{' '.join(deaths)}'",
    )
    seen: dict[tuple[object, object], object] = {}
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        while process.poll() is None:
            now = places(root)
            assert not {place for place in seen if now.get(place, seen[place]) != seen[place]}, (
                "a place was given to another group"
            )
            seen |= now
            try:
                process.wait(timeout=0.3)
            except subprocess.TimeoutExpired:
                continue
        out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out + err
    assert all((tmp_path / death).exists() for death in deaths)
    assert (
        out.count("trainer ended (killed by SIGKILL): starting it again") == 3
        and "rollout-0 ended" not in out
    )
    assert [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()] == list(
        range(16)
    )
    command("audit", "x", cwd=tmp_path)

    assert places(root) == seen and len(seen) == 64
    rollbacks = query(root, "SELECT from_step, to_step FROM rollbacks ORDER BY id")
    assert rollbacks[:2] == [(5, 4), (8, 4)], rollbacks
    assert {to_step for _, to_step in rollbacks[2:]} <= {12} and len(rollbacks) <= 3, (
        "steps that were done while 12 was being written"
    )
    versions = query(root, "SELECT version, parent, trainer_incarnation FROM versions ORDER BY version")
    assert [row[0] for row in versions] == list(range(1, len(versions) + 1)) and len(
        {row[2] for row in versions}
    ) == 4
    assert query(root, "SELECT * FROM leases") == [] and query(root, "SELECT * FROM attempts") == []
    told = command("replay", "x", cwd=tmp_path)
    assert "weights after step 12, 16: equal to those of the run, to the last bit" in told, told


def test_a_run_goes_on_without_the_checkpoints_that_a_full_disk_prevents_but_not_its_last(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (*SMALL, "trainer.num_steps=100000", "trainer.checkpoint_interval=2")
    with small_disk(root / "checkpoints", num_mib=64) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        with launcher(*settings, cwd=tmp_path, environment=cache) as process:
            wait_until(lambda: num_steps_done(root) > 5, timeout_s=90, what="training without a checkpoint")
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "trainer failed while it drained" in err, out + err
        assert "was not written" in err and "free space there" in err and "trainer ended" not in out, (
            out + err
        )
        assert query(root, "SELECT value FROM marks WHERE name = 'committed_step' AND value >= 0") == []
        assert [path.name for path in disk.iterdir()] == ["filler"]
        filler.unlink()
        num_done = num_steps_done(root)
        with launcher("name=x", "resume=latest", cwd=tmp_path, environment=cache) as process:
            wait_until(lambda: num_steps_done(root) > num_done, timeout_s=90, what="training goes on")
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), out + err
        assert list(disk.glob("step_*"))
        command("audit", "x", cwd=tmp_path)


@pytest.mark.chaos
def test_a_killed_buffer_costs_a_pause_and_ranks_come_and_go(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (
        *SMALL,
        "trainer.num_steps=100000",
        "trainer.checkpoint_interval=5",
        "rollout.num_servers=2",
        "daemon.drain_timeout_s=120",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        wait_until(lambda: num_steps_done(root) > 5, timeout_s=90, what="training")
        others = [pid_of(root, part) for part in ("-m trainer ", "rollout-0", "rollout-1")]
        before = places(root)
        os.kill(pid_of(root, "-m buffer "), signal.SIGKILL)
        num_done = num_steps_done(root)
        wait_until(lambda: num_steps_done(root) > num_done + 5, timeout_s=90, what="training goes on")
        assert set(others) <= set(processes_of(root)), "somebody else had to be started again"
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out + err
    after = places(root)
    assert before.items() <= after.items()
    command("audit", "x", cwd=tmp_path)

    for world_size in (2, 1):
        num_done = num_steps_done(root)
        with launcher(
            "name=x", "resume=latest", f"trainer.world_size={world_size}", cwd=tmp_path, environment=cache
        ) as process:
            wait_until(
                lambda num_done=num_done: num_steps_done(root) > num_done + 3,
                timeout_s=90,
                what="training goes on",
            )
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), out + err
        assert after.items() <= places(root).items(), "the stream did not go on where it stood"
        after = places(root)
        command("audit", "x", cwd=tmp_path)
    assert query(root, "SELECT DISTINCT reason FROM tickets WHERE reason IS NOT NULL") == [], (
        "a drain has dropped work"
    )
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))


@pytest.mark.chaos
def test_data_that_no_trainer_survives_are_named_and_dropped_and_the_run_goes_on(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (
        *SMALL,
        "trainer.num_steps=6",
        "trainer.checkpoint_interval=2",
        "objective._target_=tests.support.fault_points.Doomed",
        f"objective.folder={tmp_path}",
        "objective.deaths=poison:3",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        out, err = process.communicate(timeout=150)
    assert process.returncode == 2, out + err
    assert out.count("trainer ended (killed by SIGKILL): starting it again") == 3
    tickets = {position: ticket_id for (step, position), ticket_id in places(root).items() if step == 3}
    assert (
        f"3 trainers died in step 3, whose tickets are {' '.join(str(tickets[position]) for position in range(4))}"
        in err
    )
    command("drop", "x", str(tickets[0]), cwd=tmp_path)
    with launcher("name=x", "resume=latest", cwd=tmp_path, environment=cache) as process:
        out, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (0, ""), out + err
    now = places(root)
    assert now[3, 0] != tickets[0] and all(now[3, position] == tickets[position] for position in (1, 2, 3))
    assert query(root, "SELECT ticket_id FROM tickets WHERE reason = 'poison'") == [(tickets[0],)]
    command("audit", "x", cwd=tmp_path)
