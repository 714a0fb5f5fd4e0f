"""Trackers: what TensorBoard and W&B read back, resumes, names, secrets, and trackers that fail or hang."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.security.redaction import HIDDEN, without_secrets
from tests.support.launching import ROOT
from tests.support.trackers import Hanging, Kept, Raising, scalars, texts, wandb_config, wandb_history
from trainer.metrics.prometheus import TRACKER_OUTCOMES
from trainer.metrics.run_files import EvaluationsFile, MetricsFile
from trainer.trackers import TrackedRun, Tracker, build_trackers
from trainer.trackers.feed import MAX_WAITING, Trackers
from trainer.trackers.names import VERL, VERL_EVALUATION, evaluation_numbers, step_numbers

SECRET = "sk-0123456789"


def row(step: int, *, reward: float = 0.5) -> dict[str, Any]:
    return {
        "step": step,
        "time_unix_s": 1.7e9 + step,
        "loss": None if step == 2 else 0.1 * step,
        "grad_norm": 1.5,
        "reward_mean": reward,
        "step_s": 2.0,
        "wait_data_s": 0.5,
        "reward_parts": {"format": 0.25, "broken": None},
        "by_label": {"sums\x1b[2J": {"num_samples": 4, "reward_mean": reward}},
    }


def evaluation(step: int, *, avg: float, time_unix_s: float) -> dict[str, Any]:
    return {
        "step": step,
        "set": "sums",
        "time_unix_s": time_unix_s,
        "avg": avg,
        "ci_low": None,
        "ci_high": avg + 0.125,
        "pass_at_k": {"1": avg, "8": 0.875},
        "num_prompts": 30,
        "num_samples": 8,
        "num_failed": 0,
        "truncated_fraction": 0.25,
        "mean_tokens": 5.0,
        "seconds": 2.0,
    }


def job(tmp_path: Path, *trackers: Any) -> Config:
    env = {"HF_TOKEN": SECRET}
    sglang = {"env": env}
    return from_mapping(
        {
            "name": "x",
            "runs_dir": str(tmp_path),
            "trackers": list(trackers),
            "task": {"name": "sort", "judge": {"api_key": SECRET, "model": "m"}},
            "rollout": {"engine": "sglang", "sglang": sglang},
            "weights": {"integrity": "none"},
        }
    )


def train(config: Config, steps: range, *, reward: float) -> dict[str, Any]:
    """Logs these steps as a trainer does that starts here; returns the trackers' status at the end.

    The evaluation of the weights before each third step comes in one step later.
    """
    paths = RunPaths.of(config)
    metrics = MetricsFile(paths.metrics, start_step=steps.start)
    evaluations = EvaluationsFile(paths.evaluations, start_step=steps.start)
    trackers = Trackers.of(
        config, start_step=steps.start, is_rewound=metrics.num_dropped > 0, on_outcome=lambda _: None
    )
    for step in steps:
        metrics.append(row(step, reward=reward))
        trackers.stepped(metrics.last)
        if step % 3 == 1 and not (steps.start and step == steps.start + 1):
            evaluated = evaluation(step - 1, avg=reward, time_unix_s=1.7e9 + step + 0.5)
            evaluations.append(evaluated)
            trackers.evaluated(evaluated)
    trackers.close({"steps": metrics.num_rows}, limit_s=30, waits=contextlib.nullcontext)
    metrics.close()
    evaluations.close()
    return trackers.status()


def test_tensorboard_replaces_steps_that_are_trained_again(tmp_path: Path) -> None:
    config = job(tmp_path, {"name": "tensorboard", "aliases": "verl"})
    train(config, range(5), reward=0.25)
    train(config, range(3, 6), reward=0.75)
    folder = RunPaths.of(config).tensorboard
    found = scalars(folder)
    assert found["train/reward_mean"] == {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.75, 4: 0.75, 5: 0.75}
    assert found["critic/score/mean"] == found["train/reward_mean"]
    assert set(found["train/loss"]) == {0, 1, 3, 4, 5}, "an unknown number is left out"
    assert found["eval/sums/avg@8"] == {0: 0.25, 3: 0.25} == found["val-core/sums/reward/mean@8"]
    assert found["val-core/sums/reward/best@8/mean"] == {0: 0.875, 3: 0.875}
    assert json.loads(texts(folder)["summary"]) == {"steps": 6}
    assert SECRET not in texts(folder)["config"] and '"name": "sort"' in texts(folder)["config"]
    assert "torch.utils.tensorboard" not in sys.modules


def test_a_tracker_that_comes_later_gets_all_rows(tmp_path: Path) -> None:
    train(job(tmp_path), range(4), reward=0.25)
    config = job(tmp_path, "tensorboard", {"name": "tensorboard", "dir": str(tmp_path / "logs")})
    assert list(train(config, range(4, 6), reward=0.75)) == ["tensorboard", "tensorboard-2"]
    for folder in (RunPaths.of(config).tensorboard, tmp_path / "logs" / "x"):
        assert set(scalars(folder)["train/reward_mean"]) == set(range(6))


@pytest.mark.chaos
def test_wandb_offline_has_one_whole_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = job(tmp_path, {"name": "wandb", "project": "p", "tags": ["a"], "aliases": "verl"})
    for steps, reward in ((range(5), 0.25), (range(3, 6), 0.75)):
        status = train(config, steps, reward=reward)["wandb"]
        assert (status["state"], status["failed"], status["failure"]) == ("closed", 0, "")
        assert status["logged"] >= len(steps)
        wandb.teardown()  # as at the end of a process: the file is whole
    folder = RunPaths.of(config).wandb
    (earlier,) = folder.glob("replaced-run-*")
    (directory,) = folder.glob("offline-run-*")
    assert earlier.name.rpartition("-")[2] == directory.name.rpartition("-")[2], "one id for the run"
    rows = wandb_history(directory)
    assert [one["_step"] for one in rows] == list(range(6))
    assert [one["train/reward_mean"] for one in rows] == [0.25] * 3 + [0.75] * 3
    assert [one["training/global_step"] for one in rows] == list(range(6))
    assert [int(one["_timestamp"]) for one in rows] == [row(step)["time_unix_s"] for step in range(6)]
    evaluated = [one for one in rows if "eval/step" in one]
    assert [(one["_step"], one["eval/step"], one["eval/sums/pass@8"]) for one in evaluated] == [
        (1, 0, 0.875),
        (3, 3, 0.875),
    ]
    assert wandb_config(directory)["task"]["judge"] == {"api_key": HIDDEN, "model": "m"}
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    assert not list((directory / "files").iterdir()), "the command line, packages or host"


def test_trackers_that_fail_or_hang_do_not_stop_training(caplog: pytest.LogCaptureFixture) -> None:
    class Unopened(Kept):
        def open(self, run: TrackedRun) -> None:
            raise RuntimeError("no service")

    counts: Counter[str] = Counter()
    kept, raising, hanging, unopened = Kept(), Raising(), Hanging(), Unopened()
    run = TrackedRun(
        name="x", root=Path(), config={}, start_step=0, is_rewound=False, earlier_rows=lambda: iter(())
    )
    tried: dict[str, Tracker] = {"kept": kept, "raising": raising, "hanging": hanging, "unopened": unopened}
    trackers = Trackers(
        {name: (tracker, run) for name, tracker in tried.items()},
        on_outcome=lambda name: counts.update([name]),
    )

    def wait_for(num_rows: int) -> None:
        for name in ("kept", "raising", "unopened"):
            while sum(trackers.status()[name][outcome] for outcome in TRACKER_OUTCOMES) < num_rows:
                time.sleep(0.001)

    num_rows = MAX_WAITING + 10
    for step in range(num_rows):
        trackers.stepped(row(step))
        if step % 100 == 0:
            wait_for(step + 1)  # the other trackers keep up
        while step == 0 and trackers.status()["hanging"]["waiting"]:
            time.sleep(0.001)
    wait_for(num_rows)
    waited_for = []

    @contextlib.contextmanager
    def waits(name: str) -> Iterator[None]:
        waited_for.append(name)
        yield

    trackers.close({}, limit_s=2.0, waits=waits)
    assert waited_for == [f"tracker {name} to end" for name in tried]
    assert [one.step for one in kept.rows] == list(range(num_rows)) and kept.is_closed and raising.is_closed
    status = trackers.status()
    assert (status["raising"]["logged"], status["raising"]["failed"]) == (num_rows // 2, num_rows // 2)
    assert (status["hanging"]["logged"], status["hanging"]["left_out"]) == (0, 9), "all but one and the queue"
    assert (status["unopened"]["state"], status["unopened"]["left_out"]) == ("off", num_rows)
    assert counts["logged"] == num_rows + num_rows // 2
    said = [record.getMessage() for record in caplog.records if "training continues" in record.getMessage()]
    assert len(said) == 3 and any("No space left" in text for text in said), "one message a tracker"
    assert hanging.is_abandoned
    assert any("hanging did not end" in record.getMessage() for record in caplog.records)


def test_the_tracker_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "guides" / "trackers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    (tmp_path / "my_trackers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (listed,) = re.findall(r"```yaml\n(trackers: \[.*?)```", guide, re.S)
    settings = yaml.safe_load(listed)["trackers"]
    status = train(job(tmp_path, *settings), range(3), reward=0.25)
    assert status["RewardFile"]["failure"] == ""
    assert (tmp_path / "x" / "r.csv").read_text() == "0,0.25\n1,0.25\n2,0.25\n"


def test_names_are_grouped_and_numbers_finite() -> None:
    numbers = step_numbers(row(2) | {"lr": math.nan, "new_metric": 3, "eval_reward": 0.5})
    assert numbers == {
        "train/reward_mean": 0.5,
        "train/new_metric": 3,
        "stability/grad_norm": 1.5,
        "performance/step_s": 2.0,
        "performance/wait_data_s": 0.5,
        "performance/idle_fraction": 0.25,
        "reward_parts/format": 0.25,
        "by_label/sums?[2J/num_samples": 4,
        "by_label/sums?[2J/reward_mean": 0.5,
    }
    numbers = evaluation_numbers(evaluation(5, avg=0.5, time_unix_s=0.0))
    assert {name.removeprefix("eval/sums/"): value for name, value in numbers.items()} == {
        "avg@8": 0.5,
        "pass@1": 0.5,
        "pass@8": 0.875,
        "ci_high": 0.625,
        "truncated_fraction": 0.25,
        "mean_tokens": 5.0,
        "num_failed": 0,
        "seconds": 2.0,
    }


def test_verl_names_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "metrics-verl.md").read_text()
    table = page.partition("| `metrics.jsonl`")[2].partition("| `summary.json`")[0]
    listed: dict[str, set[str]] = {}
    for ours, verl in re.findall(r"^\| (`.*?) \| (`.*?) \|", table, re.M):
        columns, names = re.findall(r"`(\w+)`", ours), re.findall(r"`([^`]+)`", verl)
        pairs = (
            zip(columns, names, strict=True) if len(columns) > 1 else ((columns[0], name) for name in names)
        )
        for column, name in pairs:
            listed.setdefault(column, set()).add(name)
    of_evaluation = {field: (name,) for field, name in VERL_EVALUATION.items()}
    assert listed == {column: set(names) for column, names in (VERL | of_evaluation).items()}


def test_secrets_are_not_sent() -> None:
    config = {
        "api_key": "s1",
        "judge": [{"url": "https://u:s2@host/v1?api_key=s3&n=1", "Authorization": "s4", "api_key_file": "k"}],
        "env": {"ANYTHING": "s5", "EMPTY": ""},
        "headers": {"X": ["s6"]},
        "args": "--api-key s7 --token=s8 --max-total-tokens 100 --tokenizer-path t",
        "hf_token": "s9",
        "max_tokens": 7,
        "prompt_key": "question",
        "security": {"keys": "dir"},
    }
    sent = without_secrets(config)
    assert not re.findall(r"\bs\d\b", json.dumps(sent)), sent
    assert sent["max_tokens"] == 7 and sent["prompt_key"] == "question" and sent["env"]["EMPTY"] == ""
    assert (
        sent["judge"][0]["url"].startswith(f"https://{HIDDEN}@host/v1?") and sent["judge"][0]["api_key_file"]
    )
    assert sent["args"].endswith("--max-total-tokens 100 --tokenizer-path t")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["wandbb"], ["trackers.name=wandbb", "tensorboard, wandb", "_target_"]),
        ([{"name": "wandb", "projekt": "p"}], ["trackers.projekt", "did you mean project"]),
        ([{"name": "wandb", "mode": "on"}], ["trackers.mode=on", "offline"]),
        ([{"name": "wandb", "tags": "a"}], ["trackers.tags", "list"]),
        ([{"project": "p"}], ["trackers", "`name`"]),
        ([{"_target_": "json.JSONDecoder"}], ["not a subclass"]),
    ],
)
def test_mistakes_are_one_message(settings: list[Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_trackers(settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed.*pip install 'areal-like\[trackers\]'"):
        build_trackers(["wandb"])
    assert build_trackers([{"_target_": "tests.support.trackers.Kept"}])
