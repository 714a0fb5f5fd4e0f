"""The parts of the launcher that need no daemon: run directories, progress, views, settings."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from areal_like.config import Config, from_mapping
from areal_like.config.default_objective import as_setting, default_objective
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config, save_config
from areal_like.wire.addresses import buffer_addresses
from launch.commands.join import buffer_settings, free_name
from launch.formatting import duration
from launch.observation.observer import DaemonView, Observation, look_at_daemons
from launch.observation.progress import MAX_STRETCHES, MetricsTail, Progress, StepTally
from launch.run_directory.open_run import OpenRun, open_run
from launch.settings_help import COMMON, all_keys
from launch.view.picture import picture
from launch.view.plain import plain_line
from launch.view.plot import curve
from launch.view.speed import Eta
from launch.view.status import daemon_table
from trainer.distributed.spawn import start_ranks


def test_unnamed_runs_are_numbered_and_named_ones_refused(tmp_path: Path) -> None:
    runs_dir = f"runs_dir={tmp_path}"
    names = []
    for _ in range(3):
        run = open_run([runs_dir])
        run.paths.metrics.write_text("{}\n")
        names.append(run.config.name)
        run.close()
    assert names == ["default", "default-2", "default-3"]
    with pytest.raises(ConfigError, match=r"already holds an unfinished run.*no checkpoint"):
        open_run([runs_dir, "name=default"])
    RunPaths(tmp_path / "default").summary.write_text("{}")
    (tmp_path / "default" / "checkpoints" / "step_000010").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"already holds a finished run.*resume=latest"):
        open_run([runs_dir, "name=default"])


def test_a_run_that_never_trained_leaves_its_name_free(tmp_path: Path) -> None:
    for _ in range(2):
        run = open_run([f"runs_dir={tmp_path}", "name=x"])
        (run.paths.endpoints / "buffer.json").write_text("{}")
        run.close()
    run = open_run([f"runs_dir={tmp_path}", "name=x"])
    assert not list(run.paths.endpoints.iterdir())
    run.close()


def test_a_directory_in_use_is_refused_if_named_else_skipped(tmp_path: Path) -> None:
    run = open_run([f"runs_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="in use"):
        open_run([f"runs_dir={tmp_path}", "name=default"])
    other = open_run([f"runs_dir={tmp_path}"])
    assert other.config.name == "default-2"
    run.close()
    other.close()


def test_resume_keeps_the_runs_own_settings(tmp_path: Path) -> None:
    base = [f"runs_dir={tmp_path}", "name=x"]
    with pytest.raises(ConfigError, match="there is no run in"):
        open_run([*base, "resume=latest"])
    run = open_run([*base, "trainer.groups_per_step=3", "objective=tis", "objective.cap=7"])
    run.close()
    with pytest.raises(ConfigError, match="no checkpoint"):
        open_run([*base, "resume=latest"])
    ledger = run.paths.root / "ledger" / "ledger.sqlite3"
    ledger.parent.mkdir()
    ledger.touch()
    again = open_run([*base, "resume=latest"])
    again.close()
    assert (again.config.resume, again.config.trainer.groups_per_step) == ("", 3), (
        "from step 0, with the recorded groups"
    )
    for step in (10, 20):
        (run.paths.checkpoints / f"step_{step:06d}").mkdir(parents=True)
    with pytest.raises(ConfigError, match="step:10, step:20"):
        open_run([*base, "resume=step:15"])
    run = open_run([*base, "resume=step:20", "trainer.num_steps=77", "task=sort"])
    run.close()
    assert (
        run.config.trainer.groups_per_step,
        run.config.trainer.num_steps,
        run.config.objective["cap"],
    ) == (3, 77, 7)
    assert run.config.resume == "step:20"
    assert "groups_per_step: 3" in run.paths.config.read_text()


def test_a_run_keeps_the_objective_that_auto_chose(tmp_path: Path) -> None:
    def opened(*settings: str) -> OpenRun:
        run = open_run([f"runs_dir={tmp_path}", "name=x", *settings])
        run.keep_settings()
        run.close()
        return run

    long = "sampling.max_new_tokens=2048"
    run = opened()
    assert load_config(["--config", str(run.paths.config)]).objective == default_objective()
    # A run of an earlier release, with its default.
    save_config(dataclasses.replace(run.config, objective={"name": "tis"}), run.paths.config)
    (run.paths.checkpoints / "step_000010").mkdir(parents=True)
    file = tmp_path / "job.yaml"
    file.write_text(f"name: x\nruns_dir: {tmp_path}\nsampling: {{max_new_tokens: 2048}}\n")
    for settings in ((long,), ("--config", str(file))):
        run = opened("resume=latest", *settings)
        assert (run.config.objective, run.config.sampling.max_new_tokens) == ({"name": "tis"}, 2048)
        assert not any("objective=auto" in line for line in run.announcement)
    run = opened("resume=latest", "objective.cap=3")
    assert run.config.objective == {"name": "tis", "cap": 3}
    run = opened("resume=latest", "objective=auto")
    assert run.config.objective == default_objective() and "2048" in run.announcement[-1]
    assert load_config(["--config", str(run.paths.config)]).objective == run.config.objective
    with pytest.raises(ConfigError, match="name the objective to change them"):
        open_run([f"runs_dir={tmp_path}", "name=y", "objective.cap=3"])
    assert not (tmp_path / "y").exists()


def test_resume_auto_begins_continues_and_ends(tmp_path: Path) -> None:
    command = [f"runs_dir={tmp_path}", "name=x", "resume=auto", "trainer.num_steps=20"]

    def start(*settings: str) -> OpenRun:
        run = open_run([*command, *settings])
        run.close()
        return run

    run = start("trainer.groups_per_step=3")
    assert run.announcement[0].startswith("new run in") and run.config.resume == "auto"
    run.paths.metrics.write_text("{}\n")  # of a run whose ledger was in memory
    for ledger in ("", "with the groups in its ledger"):
        run = start()
        assert "from step 0" in run.announcement[0] and ledger in run.announcement[0]
        assert (run.config.resume, run.config.trainer.groups_per_step) == ("auto", 3)
        (run.paths.root / "ledger").mkdir(exist_ok=True)
        (run.paths.root / "ledger" / "ledger.sqlite3").touch()
    (run.paths.checkpoints / "step_000020").mkdir(parents=True)
    assert not start().is_finished, "its last evaluation and summary are missing"
    run.paths.summary.write_text(json.dumps({"finished": True}))
    assert start().is_finished and "is finished" in start().announcement[0]
    assert start("resume=latest").is_finished, "its results stay as they are"
    more = start("trainer.num_steps=30")
    assert not more.is_finished and more.announcement[0].startswith("resume of step 20")


def announced(*argv: str) -> str:
    """The first lines of `areal-like run` with these words."""
    run = open_run(argv)
    run.close()
    return "\n".join(run.announcement)


def test_run_prints_its_choice_of_directory(tmp_path: Path) -> None:
    runs_dir, first = f"runs_dir={tmp_path}", tmp_path / "default"
    new, choice = announced(runs_dir).split("\n")
    assert new == f"new run in {first}"
    assert choice == (
        f"objective=auto is {as_setting(default_objective())}: its weights are means over the tokens of a "
        "sample, which suit answers of every length (here up to 10 tokens: sampling.max_new_tokens=10)"
    )
    for step in (10, 20):
        (first / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    text = announced(runs_dir)
    assert text.startswith(f"new run in {tmp_path / 'default-2'} ({first} holds an earlier run")
    assert "name=NAME" in text and "name=default resume=latest continues" in text
    assert "resume=step:K from one of its checkpoints (step:10, step:20)" in text
    text = announced(runs_dir, "name=default", "resume=latest")
    assert text.startswith(f"resume of step 20 from {first}, its newest checkpoint")
    assert "resume=step:K goes back" in text and "name=... starts a new run" in text
    text = announced(runs_dir, "name=default", "resume=step:10")
    assert text.startswith(f"resume of step 10 from {first}; later steps are undone")
    assert "resume=latest continues from the newest checkpoint (step 20)" in text
    (first / "summary.json").write_text("{}")
    with pytest.raises(ConfigError) as refusal:
        open_run([runs_dir, "name=default"])
    for part in (
        f"{first} already holds a finished run",
        "another name=...",
        "resume=latest",
        "resume=step:K",
    ):
        assert part in str(refusal.value)


def test_run_prints_that_a_run_without_checkpoints_begins_again(tmp_path: Path) -> None:
    ledger = tmp_path / "x" / "ledger" / "ledger.sqlite3"
    argv = [f"runs_dir={tmp_path}", "name=x"]
    assert announced(*argv, "objective=tis") == f"new run in {tmp_path / 'x'}"
    ledger.parent.mkdir()
    ledger.touch()
    assert announced(*argv, "resume=latest").startswith(f"resume of {tmp_path / 'x'} from step 0")


def test_run_prints_that_a_name_is_in_use(tmp_path: Path) -> None:
    run = open_run([f"runs_dir={tmp_path}"])
    text = announced(f"runs_dir={tmp_path}")
    run.close()
    assert f"{run.paths.root} holds a run that is in progress" in text


def test_metrics_are_read_as_they_grow_and_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == Progress()
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [row["step"] for row in tail.read().recent] == [0, 1]
    with path.open("a") as file:
        file.write('ep": 2}\nnonsense\n')
    assert [row["step"] for row in tail.read().recent] == [0, 1, 2]
    (tmp_path / "new").write_text('{"step": 0}\n')
    (tmp_path / "new").replace(path)
    assert [row["step"] for row in tail.read().recent] == [0]
    path.unlink()
    path.mkdir()  # as unreadable as a file on a file system that is gone
    assert [row["step"] for row in tail.read().recent] == [0]


def test_a_long_run_is_kept_in_bounded_memory(tmp_path: Path) -> None:
    path, rng = tmp_path / "metrics.jsonl", random.Random(0)
    rows: list[dict[str, object]] = [
        {
            "step": step,
            "reward_mean": None if step % 7 == 3 else rng.uniform(-0.5, 1.5),
            "lag_max": 9 if step == 5 else 2,
        }
        | ({"eval_reward": step / 1e5} if step % 100 == 0 and step < 9_000 else {})
        for step in range(10_000)
    ]
    known_rewards = [row["reward_mean"] for row in rows if row["reward_mean"] is not None]
    rewards = [float(reward) for reward in known_rewards]  # type: ignore[arg-type]
    tail, written = MetricsTail(path), 0
    for num_rows in (1, 49, 51, 2_000, 2_300, 2_500, 9_999, 10_000):
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows[written:num_rows]))
        written = num_rows
        seen = tail.read()
        assert seen.recent == tuple(rows[:num_rows][-50:])
        known = rewards[: num_rows - sum(step % 7 == 3 for step in range(num_rows))]
        assert (seen.reward_low, seen.reward_high) == (min(0.0, *known, 0.0), max(1.0, *known, 1.0))
        assert (seen.lag_max, seen.eval_reward) == (
            9 if num_rows > 5 else 2,
            (min(num_rows - 1, 8_999) // 100) * 100 / 1e5,
        )
        length = 1
        while len(known) > length * MAX_STRETCHES and length * MAX_STRETCHES + length <= len(known):
            length *= 2
        expected = [known[at : at + length] for at in range(0, len(known), length)]
        assert seen.rewards == pytest.approx([sum(stretch) / len(stretch) for stretch in expected])
        assert len(seen.rewards) <= MAX_STRETCHES + 1


def test_a_dead_endpoint_is_seen_as_unanswering(tmp_path: Path) -> None:
    (tmp_path / "rollout-0.json").write_text(json.dumps({"role": "rollout", "http": "127.0.0.1:1"}))
    (tmp_path / "broken.json").write_text("{")
    seen = look_at_daemons(tmp_path)
    assert list(seen) == ["rollout-0"]
    assert seen["rollout-0"].status is None and "no response" in seen["rollout-0"].not_ready


def test_a_server_that_joins_finds_every_shard(tmp_path: Path) -> None:
    config = from_mapping(
        {"buffer": {"num_shards": 2, "host": "10.0.0.{shard}"}, "runs_dir": str(tmp_path), "name": "x"}
    )
    paths = RunPaths.of(config)
    paths.endpoints.mkdir(parents=True)
    (paths.endpoints / "buffer-0.json").write_text(json.dumps({"stream": "tcp://10.0.0.0:7001"}))
    with pytest.raises(ConfigError, match="buffer-1 of x is not running"):
        buffer_settings(config, paths, "")
    (paths.endpoints / "buffer-1.json").write_text(json.dumps({"stream": "tcp://10.0.0.1:6001"}))
    save_config(config, paths.config)
    for start in (["--config", str(paths.config)], ['buffer.host="10.0.0.{shard}"', "buffer.num_shards=2"]):
        joined = load_config([*start, *buffer_settings(config, paths, "")])
        assert buffer_addresses(joined) == ["tcp://10.0.0.0:7001", "tcp://10.0.0.1:6001"]
        joined = load_config([*start, *buffer_settings(config, None, "node{shard}:5555")])
        assert buffer_addresses(joined) == ["tcp://node0:5555", "tcp://node1:5556"]
    with pytest.raises(ConfigError, match="give --buffer host:port"):
        buffer_settings(config, None, "")


def test_the_curve_rises_from_bottom_left_to_top_right() -> None:
    lines = curve([i / 99 for i in range(100)], width=10, height=4, low=0.0, high=1.0)
    assert [len(line) for line in lines] == [10] * 4
    blank = "\u2800"
    assert lines[0][-1] != blank and lines[0][0] == blank
    assert lines[-1][0] != blank and lines[-1][-1] == blank


def test_units() -> None:
    assert (duration(7), duration(187), duration(3729)) == ("7 s", "3 min 7 s", "1 h 2 min")


def test_a_trainer_that_goes_back_has_no_negative_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("launch.view.speed.time.monotonic", lambda: now_s[0])
    eta = Eta(num_steps=100)
    for now_s[0], step in enumerate((20, 16, 17)):
        eta.see(step)
        assert (str(eta), eta.steps_per_s) == (("-", None) if step != 17 else ("1 min 22 s", 1.0))


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("steps", [0, 1, 500])
def test_the_picture_shows_the_observed_data(width: int, steps: int) -> None:
    status = {
        "not_ready": "",
        "waiting_on": {"a group": 1.5},
        "tickets": {"queued": 3, "dropped": 2},
        "drops": {"stale": 2, "failed": 0},
    }
    daemons = {
        "buffer": DaemonView(name="buffer", endpoint={"role": "buffer"}, status=status, seen_s=1.0),
        "rollout-0": DaemonView(name="rollout-0", endpoint={}, status=None, seen_s=0.0),
    }
    row = {
        "reward_mean": 0.5,
        "lag_histogram": {"0": 3, "2": 1},
        "lag_max": 2,
        "tokens_per_s_trained": None,
        "eval_reward": 0.25,
        "mfu": 0.413,
        "loss": -0.25,
    }
    tally = StepTally()
    for step in range(steps):
        tally.add(row | {"step": step})
    seen = Observation(daemons=daemons, progress=tally.progress)
    config = Config()
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(
        picture(seen, config=config, eta=Eta(num_steps=600), phase="running", detail="", width=width)
    )
    text = console.export_text()
    assert f"step {steps}/600" in text
    if width >= 80:
        assert "buffer" in text and "rollout-0" in text and "stale 2" in text and "failed" not in text
    if steps and width >= 80:
        assert (
            "held-out 0.25" in text and "75%" in text and "loss -0.2500" in text and "trained -" not in text
        )
        line = plain_line(seen, config, Eta(num_steps=600))
        assert "max 2" in line and "MFU 41%" in line and "MFU 41%" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_status_never_cuts_the_reason(width: int) -> None:
    reason = "no answer from the engine at 127.0.0.1:40000; starting another for the third time"
    waits = {"a group of step 12 from buffer-1": 3.25}
    status = {"state": "quarantined", "not_ready": reason, "waiting_on": waits, "weights_version": 7}
    endpoint = {"role": "rollout"}
    daemons = [
        DaemonView(name="rollout-0", endpoint=endpoint, status=status, seen_s=1.0),
        DaemonView(name="rollout-1", endpoint=endpoint, status=None, seen_s=0.0),
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(daemon_table(daemons, width=width))
    lines = console.export_text().splitlines()
    column = lines[0].index("waiting for")
    text = " ".join(" ".join(line[column:] for line in lines).split())
    assert reason in text and "a group of step 12 from buffer-1 3.2 s" in text and "no response" in text
    assert "…" not in text
    assert all(len(line) <= width for line in lines)


def test_the_picture_has_one_line_for_each_daemon() -> None:
    reason = "no answer from the engine at 127.0.0.1:40000;\nstarting another for the third time"
    waits = {"a group of step 12 from buffer-1": 3.25}
    console = Console(width=80, record=True, file=io.StringIO())

    def drawn(status: dict[str, object]) -> list[str]:
        view = DaemonView(name="rollout-0", endpoint={"role": "rollout"}, status=status, seen_s=0.0)
        seen = Observation(daemons={"rollout-0": view})
        eta = Eta(num_steps=600)
        console.print(picture(seen, config=Config(), eta=eta, phase="running", detail="", width=80))
        return console.export_text().splitlines()

    lines = drawn({"state": "quarantined", "not_ready": reason, "waiting_on": waits})
    assert len(lines) == len(drawn({"state": "serving", "not_ready": ""}))
    assert "rollout-0" in lines[-1] and "quarantined" in lines[-1]
    assert "no answer" in lines[-1] and lines[-1].rstrip().endswith("…")


def test_help_is_complete() -> None:
    keys = {setting.key: setting for setting in all_keys()}
    assert set(COMMON) <= set(keys), "a key that help shows was renamed"
    assert not [setting.key for setting in keys.values() if not setting.text], "a field without a docstring"
    assert keys["trainer.num_steps"].default == "600" and "steps" in keys["trainer.num_steps"].text
    default = from_mapping({})
    assert keys["seed"].default == str(default.seed)


def test_servers_that_join_at_once_get_different_names(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for directory in (paths.logs, paths.endpoints):
        directory.mkdir()
    (paths.endpoints / "rollout-1.json").touch()
    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: free_name(paths), range(8)))
    assert sorted(names) == [f"rollout-{number}" for number in range(9) if number != 1]


@pytest.mark.parametrize(
    ("ends", "code"), [("os.kill(os.getpid(), 9)", 137), ("sys.exit(3)", 3), ("None", 0)]
)
def test_exit_codes_distinguish_killed_and_failed_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, code: int
) -> None:
    (tmp_path / "ranks_that_end.py").write_text(
        f"import os, sys\nif os.environ['RANK'] == '1':\n    {ends}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert start_ranks([], world_size=2, module="ranks_that_end") == code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
