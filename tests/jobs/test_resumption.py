"""Whole jobs whose buffer and trainer are killed, with the real daemons: no group is lost or trained twice.

One run with three killed trainers is recorded and shared by the tests that only read it and replay it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from areal_like.runtime.command_line import load_config
from tests.support.launching import (
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.small_disk import small_disk
from trainer.replay.recording import Recording

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
SMALL = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "eval.num_prompts=0",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=30",
    "max_staleness=2",
)
NUM_STEPS = 16
DEATHS = ("update:5", "save:7", "commit:11")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The run's directory."""
    return tmp_path / "runs" / "x"


def query(root: Path, sql: str) -> list[tuple[object, ...]]:
    """Rows of the ledger, which may be in use."""
    path = root / "ledger" / "ledger.sqlite3"
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=600)) as connection:
        # The buffer creates the file first and its tables a moment later.
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'tickets'").fetchone() is None:
            return []
        return connection.execute(sql).fetchall()


def filled_places(root: Path) -> dict[tuple[object, object], object]:
    """(step, position) -> ticket id, of every group that was recorded and not dropped."""
    rows = query(root, "SELECT step, position, ticket_id FROM tickets WHERE state IN ('batched', 'trained')")
    assert len({row[:2] for row in rows}) == len(rows), "two groups have the same position"
    return {(step, position): ticket_id for step, position, ticket_id in rows}


def pid_of(root: Path, part: str) -> int:
    """The id of the process whose command line contains `part`."""
    return next(pid for pid, command in processes_of(root).items() if part in command)


def command(*words: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Runs `areal-like WORDS`, which must succeed; returns its output."""
    run = areal_like(*words, cwd=cwd, environment=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def rows_of(root: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True, kw_only=True)
class BrokenRun:
    """A finished run whose trainer was killed three times."""

    folder: Path
    """Working directory of the launcher."""
    root: Path
    out: str
    """Output of the launcher."""
    places: dict[tuple[object, object], object]
    """(step, position) -> ticket id, of every position that was filled at any time during the run."""


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory, cache: dict[str, str]) -> BrokenRun:
    """A run in which the trainer dies before, while and after a checkpoint is written."""
    folder = tmp_path_factory.mktemp("broken")
    root = folder / "runs" / "x"
    settings = (
        *SMALL,
        f"trainer.num_steps={NUM_STEPS}",
        "trainer.checkpoint_interval=4",
        "buffer.retain_trajectories=true",
        "objective._target_=tests.support.fault_points.KilledTrainer",
        f"objective.folder={folder}",
        f"objective.deaths='{' '.join(DEATHS)}'",
    )
    seen: dict[tuple[object, object], object] = {}

    def look() -> None:
        now = filled_places(root)
        moved = {place for place in seen if now.get(place, seen[place]) != seen[place]}
        assert not moved, "a recorded position was given to another group"
        seen.update(now)

    with launcher(*settings, cwd=folder, environment=cache) as process:
        while process.poll() is None:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
        look()  # the last places may have been filled since
        out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out + err
    return BrokenRun(folder=folder, root=root, out=out, places=seen)


@pytest.mark.long
def test_a_trainer_killed_at_each_point_loses_nothing(broken_run: BrokenRun) -> None:
    """Long, because the run before it starts its trainer four times and trains some steps twice."""
    root, out = broken_run.root, broken_run.out
    assert all((broken_run.folder / death).exists() for death in DEATHS)
    assert out.count("trainer ended (killed by SIGKILL): starting it again") == 3
    assert "rollout-0 ended" not in out
    assert [row["step"] for row in rows_of(root)] == list(range(NUM_STEPS))
    command("audit", "x", cwd=broken_run.folder)

    assert filled_places(root) == broken_run.places and len(broken_run.places) == 4 * NUM_STEPS
    rollbacks = query(root, "SELECT from_step, to_step FROM rollbacks ORDER BY id")
    assert rollbacks[:2] == [(5, 4), (8, 4)], rollbacks
    # The third rollback may only undo steps trained while the checkpoint of step 12 was being written.
    assert {to_step for _, to_step in rollbacks[2:]} <= {12} and len(rollbacks) <= 3
    versions = query(root, "SELECT version, parent, trainer_incarnation FROM versions ORDER BY version")
    assert [row[0] for row in versions] == list(range(1, len(versions) + 1))
    assert len({row[2] for row in versions}) == 4
    assert query(root, "SELECT * FROM leases") == [] and query(root, "SELECT * FROM attempts") == []


@pytest.mark.chaos
def test_a_replay_gives_the_weights_of_the_broken_run(broken_run: BrokenRun) -> None:
    """Long, because all steps of a run are trained again."""
    out = command("replay", "x", cwd=broken_run.folder)
    assert "weights after step 12, 16: equal to the recorded run's, to the last bit" in out, out
    original, replayed = rows_of(broken_run.root), rows_of(broken_run.folder / "runs" / "x-replay")
    assert min(row["grad_norm"] for row in original) > 0, "without gradients the weights are equal anyway"
    assert [row["loss"] for row in replayed] == [row["loss"] for row in original]
    assert [row["lag_mean"] for row in replayed] == [row["lag_mean"] for row in original]
    compared = json.loads(command("replay", "x", "--against", "x-replay", "--json", cwd=broken_run.folder))
    assert (compared["equal"], compared["tolerance"], compared["last_step"]) == (True, 0, NUM_STEPS - 1)
    assert compared["compared"]["moments"] == 2 and compared["compared_means"]["loss"] == NUM_STEPS


@pytest.mark.chaos
def test_a_replay_with_another_objective_gives_other_weights(broken_run: BrokenRun) -> None:
    """Long, because all steps of a run are trained again."""
    words = ("name=y", "objective=ppo", "buffer.cache_bytes=0")
    out = command("replay", "x", *words, cwd=broken_run.folder)
    assert "weights after step 12, 16: different from the recorded run's" in out
    assert "buffer.cache_bytes=0 has no effect" in out
    compared = areal_like("replay", "x", "--against", "y", cwd=broken_run.folder)
    assert compared.returncode == 1 and "first difference: step 0, settings" in compared.stdout
    assert "objective._target_=tests.support.fault_points.KilledTrainer / " in compared.stdout
    replayed = rows_of(broken_run.folder / "runs" / "y")
    assert [row["reward_mean"] for row in replayed] == [
        row["reward_mean"] for row in rows_of(broken_run.root)
    ]


@pytest.mark.chaos
def test_a_replay_needs_whole_steps(broken_run: BrokenRun) -> None:
    recording = Recording(broken_run.root)
    config = load_config(["--config", str(broken_run.root / "config.yaml")])
    assert recording.num_whole_steps(groups_per_step=config.trainer.groups_per_step) == NUM_STEPS
    recording.close()
    wider = areal_like("replay", "x", "name=z", "trainer.groups_per_step=8", cwd=broken_run.folder)
    assert (wider.returncode, wider.stderr.count("\n")) == (2, 1)
    assert "has not recorded a complete step of 8 groups" in wider.stderr


@pytest.mark.chaos
def test_a_run_continues_without_checkpoints_on_a_full_disk(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (*SMALL, "trainer.num_steps=100000", "trainer.checkpoint_interval=2")
    with small_disk(root / "checkpoints", num_mib=64) as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        with launcher(*settings, cwd=tmp_path, environment=cache) as process:
            wait_for_steps(5, root, process=process)
            process.terminate()
            code, out, err = finish(process, root)
        # A drain fails if its checkpoint, the last of the run, cannot be written.
        assert code == 1 and "trainer failed while it drained" in err, out + err
        assert "was not written" in err and "free space there" in err and "trainer ended" not in out, (
            out + err
        )
        assert query(root, "SELECT value FROM marks WHERE name = 'committed_step' AND value >= 0") == []
        assert [path.name for path in disk.iterdir()] == ["filler"]
        filler.unlink()
        num_done = num_steps_done(root)
        with launcher("name=x", "resume=latest", cwd=tmp_path, environment=cache) as process:
            wait_for_steps(num_done, root, process=process)
            process.terminate()
            code, out, err = finish(process, root)
        assert (code, err) == (0, ""), out + err
        assert list(disk.glob("step_*"))
        command("audit", "x", cwd=tmp_path)


@pytest.mark.chaos
def test_a_killed_buffer_and_a_changed_number_of_ranks(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (
        *SMALL,
        "trainer.num_steps=100000",
        "trainer.checkpoint_interval=5",
        "rollout.num_servers=2",
        "daemon.drain_timeout_s=120",
        "buffer.retain_trajectories=true",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(5, root, process=process)
        others = [pid_of(root, part) for part in ("-m trainer ", "rollout-0", "rollout-1")]
        before = filled_places(root)
        os.kill(pid_of(root, "-m buffer "), signal.SIGKILL)
        wait_for_steps(num_steps_done(root) + 5, root, process=process)
        assert set(others) <= set(processes_of(root)), "another daemon had to be started again"
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    after = filled_places(root)
    assert before.items() <= after.items()
    command("audit", "x", cwd=tmp_path)

    for world_size in (2, 1):
        num_done = num_steps_done(root)
        with launcher(
            "name=x", "resume=latest", f"trainer.world_size={world_size}", cwd=tmp_path, environment=cache
        ) as process:
            wait_for_steps(num_done + 3, root, process=process)
            process.terminate()
            code, out, err = finish(process, root)
        assert (code, err) == (0, ""), out + err
        assert after.items() <= filled_places(root).items(), "the recorded groups have changed"
        after = filled_places(root)
        command("audit", "x", cwd=tmp_path)
    assert query(root, "SELECT DISTINCT reason FROM tickets WHERE reason IS NOT NULL") == [], (
        "a drain has dropped work"
    )
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))
    # Some steps had two ranks: the replay has one, so its last bits differ, and nothing else does.
    command("replay", "x", cwd=tmp_path)
    compared = command("replay", "x", "--against", "x-replay", "--tolerance", "1e-5", cwd=tmp_path)
    assert f"steps 0 to {steps[-1]}\n" in compared and "no difference\n" in compared, compared


@pytest.mark.chaos
def test_data_that_kill_every_trainer_are_reported_and_dropped(
    tmp_path: Path, root: Path, cache: dict[str, str]
) -> None:
    settings = (
        *SMALL,
        "trainer.num_steps=6",
        "trainer.checkpoint_interval=2",
        "objective._target_=tests.support.fault_points.KilledTrainer",
        f"objective.folder={tmp_path}",
        "objective.deaths=poison:3",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        code, out, err = finish(process, root)
    assert code == 2, out + err
    assert out.count("trainer ended (killed by SIGKILL): starting it again") == 3
    tickets = {
        position: ticket_id for (step, position), ticket_id in filled_places(root).items() if step == 3
    }
    numbers = " ".join(str(tickets[position]) for position in range(4))
    assert f"3 trainers died in step 3, whose tickets are {numbers}" in err
    command("drop", "x", str(tickets[0]), cwd=tmp_path)
    with launcher("name=x", "resume=latest", cwd=tmp_path, environment=cache) as process:
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    now = filled_places(root)
    assert now[3, 0] != tickets[0] and all(now[3, position] == tickets[position] for position in (1, 2, 3))
    assert query(root, "SELECT ticket_id FROM tickets WHERE reason = 'poison'") == [(tickets[0],)]
    command("audit", "x", cwd=tmp_path)


@pytest.mark.chaos
def test_a_drain_abandons_a_long_step(tmp_path: Path, root: Path, cache: dict[str, str]) -> None:
    settings = (
        *SMALL,
        "trainer.num_steps=6",
        "trainer.world_size=2",
        "trainer.tokens_per_microbatch=64",
        "rollout.max_context=64",
        "buffer.retain_trajectories=true",
        "daemon.drain_timeout_s=60",
        "objective._target_=tests.support.fault_points.SlowTrainer",
        f"objective.folder={tmp_path}",
        "objective.seconds=40",  # the first micro-batch ends after the drain's limit for a step, a third
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(2, root, process=process)
        (tmp_path / "slow").touch()
        wait_until((tmp_path / "entered").exists, what="a slow step", run_root=root, process=process)
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    step = num_steps_done(root)
    for rank in range(2):
        log = (root / "logs" / f"trainer-{rank}.log").read_text()
        assert f"draining: step {step} was abandoned in its computation" in log
    assert [int(path.name[5:]) for path in root.glob("checkpoints/step_*")] == [step]
    before = filled_places(root)
    assert {place for place in before if place[0] == step} == {(step, position) for position in range(4)}
    (tmp_path / "slow").unlink()
    with launcher("name=x", "resume=latest", cwd=tmp_path, environment=cache) as process:
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert before.items() <= filled_places(root).items(), "the open step got other groups"
    assert f"weights after step {step}, 6: equal to the recorded run's, to the last bit" in command(
        "replay", "x", f"trainer.checkpoint_interval={step}", cwd=tmp_path
    )
    command("audit", "x", cwd=tmp_path)
