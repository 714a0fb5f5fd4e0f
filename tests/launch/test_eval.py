"""`areal-like eval`: which model, which directory and which settings; then a real evaluation."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.config import from_mapping, to_mapping
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import save_config
from launch.audit.run import audit_run
from launch.run_directory.open_evaluation import (
    EvaluatedModel,
    evaluation_config,
    find_model,
    open_evaluation,
)
from launch.run_directory.open_run import OpenRun
from tests.support.launching import TEST_LIMIT_S, finish, launcher, processes_of, wait_until

JOB = (
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.SlowChecksum",
    "sampling.max_new_tokens=4",
    "rollout.reward_workers=2",
    "name=one",
)


def hf_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run `one` with checkpoints of steps 5 and 10, below the working directory."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "one"
    for step in (5, 10):
        hf_directory(root / "checkpoints" / f"step_{step:06d}")
    config = from_mapping({"name": "one", "seed": 3, "sampling": {"max_new_tokens": 7}})
    save_config(config, root / "config.yaml")
    return root


def test_a_word_names_a_model(run: Path, tmp_path: Path) -> None:
    newest = EvaluatedModel(
        path=str(run / "checkpoints" / "step_000010"), label="one-step_000010", step=10, run=run
    )
    assert find_model("one") == find_model("runs/one") == find_model(str(run)) == newest
    older = find_model("runs/one/checkpoints/step_000005/")
    assert (older.step, older.run, older.label) == (5, run, "one-step_000005")
    plain = hf_directory(tmp_path / "my model")
    assert find_model(str(plain)) == EvaluatedModel(path=str(plain), label="my model")
    assert find_model("Qwen/Qwen3-0.6B") == EvaluatedModel(path="Qwen/Qwen3-0.6B", label="Qwen3-0.6B")
    assert find_model("tiny").path == "tiny"
    (tmp_path / "runs" / "two").mkdir()
    save_config(from_mapping({"name": "two"}), tmp_path / "runs" / "two" / "config.yaml")
    for word, message in (("two", "no checkpoint yet"), ("nothing", "a directory with config.json")):
        with pytest.raises(ConfigError, match=message):
            find_model(word)


def test_an_evaluation_needs_no_trainer(run: Path) -> None:
    training = {
        "trainer": {"world_size": 8, "device": "cuda", "num_steps": 500, "tokens_per_microbatch": 9999},
        "rollout": {"engine": "sglang", "engine_device": "cuda"},
        "weights": {"integrity": "none"},
        "objective": {"name": "oapl"},
        "buffer": {"num_shards": 2, "curriculum": "paced", "durability": "none"},
        "kl": {"coef": 0.1},
        "distill": {"teachers": {"default": "http://127.0.0.1:1"}},
        "model": {"dtype": "bfloat16"},
        "max_staleness": "auto",
        "task": {"name": "data", "eval": "test.jsonl", "reward": "exact"},
    }
    config = evaluation_config(from_mapping(training), find_model("one"))
    assert config.trainer.device == "cpu" and config.trainer.world_size == config.buffer.num_shards == 1
    assert not config.distill.teachers
    assert config.trainer.tokens_per_microbatch == 9999, "the engine's context depends on it"
    assert config.buffer.retain_trajectories and config.buffer.durability == "process_crash"
    assert config.task["train"] == "test.jsonl", "a server wants training prompts; none is issued"
    assert config.model.dtype == "bfloat16" and config.model.path.endswith("step_000010")
    assert from_mapping(to_mapping(config)) == config


def opened(*argv: str) -> OpenRun:
    found = open_evaluation(find_model("one"), argv)
    found.close()
    return found


def test_an_evaluation_has_a_directory_of_its_own(run: Path) -> None:
    first = opened()
    assert first.paths.root.name == "one-step_000010-eval" and first.is_created
    assert (first.config.seed, first.config.sampling.max_new_tokens) == (3, 7), "its run's configuration"
    assert opened().paths.root.name == "one-step_000010-eval-2"
    assert opened("name=mine").paths.root.name == "mine"
    with pytest.raises(ConfigError, match=r"already holds .* resume=latest"):
        opened("name=mine")
    with pytest.raises(ConfigError, match="already holds"):
        opened("name=one")
    with pytest.raises(ConfigError, match="no evaluation in"):
        opened("name=other", "resume=latest")
    with pytest.raises(ConfigError, match="an evaluation has no steps"):
        opened("name=mine", "resume=step:3")
    assert opened("name=other", "resume=auto").is_created


def test_only_the_same_evaluation_is_continued(run: Path) -> None:
    opened("name=mine")
    again = opened("name=mine", "resume=latest", "rollout.num_servers=2")
    assert not again.is_finished and again.config.rollout.num_servers == 2
    with pytest.raises(ConfigError, match="with different settings in sampling, seed:"):
        opened("name=mine", "resume=latest", "seed=4", "sampling.max_new_tokens=8")
    with pytest.raises(ConfigError, match="with different settings in model:"):
        open_evaluation(find_model("runs/one/checkpoints/step_000005"), ["name=mine", "resume=latest"])
    again.paths.summary.write_text(json.dumps({"finished": True}))
    assert opened("name=mine", "resume=auto").is_finished
    save_config(
        from_mapping({"name": "begun", "model": {"path": again.config.model.path}}), run / "config.yaml"
    )
    with pytest.raises(ConfigError, match=r"with different settings in .*trainer:"):
        opened("name=one", "resume=latest", "sampling.max_new_tokens=8")


@contextlib.contextmanager
def evaluation(*words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`areal-like eval tiny` with the settings of `JOB` and these."""
    with launcher("tiny", *JOB, *words, verb="eval", cwd=cwd) as process:
        yield process


def samples_of(root: Path) -> dict[tuple[str, int, int], float]:
    """(set, prompt, sample) -> reward, from the ledger."""
    query = "SELECT eval_set, prompt_index, sample_index, reward FROM tickets JOIN samples USING (ticket_id)"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{root}/ledger/ledger.sqlite3?mode=ro", uri=True)) as ledger,
    ):
        return {(name, prompt, index): reward for name, prompt, index, reward in ledger.execute(query)}
    return {}


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_stopped_evaluation_is_continued(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    sets = "eval.sets={plain: {num_prompts: 40}, more: {num_prompts: 60, num_samples: 4, temperature: 1.0}}"
    with evaluation(sets, cwd=tmp_path) as process:
        wait_until(lambda: len(samples_of(root)) > 50, what="50 samples", run_root=root, process=process)
        process.send_signal(signal.SIGINT)
        code, out, _ = finish(process, root)
    before = samples_of(root)
    assert code == 1 and 50 < len(before) < 280
    assert "what is sampled stays in the ledger" in out and "no result for more" in out.replace("plain, ", "")
    assert not processes_of(root) and not (root / "summary.json").exists()

    with evaluation(sets, "resume=latest", "--json", cwd=tmp_path) as process:
        wait_until(
            lambda: len(samples_of(root)) > len(before) + 20, what="more", run_root=root, process=process
        )
        (evaluator,) = (pid for pid, line in processes_of(root).items() if "trainer.evaluate" in line)
        subprocess.run(["kill", "-KILL", str(evaluator)], check=True)
        code, out, err = finish(process, root)
    assert code == 0, err
    after = samples_of(root)
    assert len(after) == 280 and before.items() <= after.items(), "finished samples are not made again"
    results = json.loads(out)
    for name, num_samples in (("plain", 40), ("more", 240)):
        rewards = [reward for (of, _, _), reward in after.items() if of == name]
        assert len(rewards) == num_samples
        assert results["sets"][name]["avg"] == pytest.approx(sum(rewards) / num_samples)
    assert set(results["sets"]["more"]["pass_at_k"]) == {"1", "4"}
    rows = [json.loads(line) for line in (root / "evaluations.jsonl").read_text().splitlines()]
    assert {row["set"]: row for row in rows} == results["sets"]
    assert audit_run(root).is_clean


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_set_without_a_result_is_a_failure(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "one"
    broken = "task: {_target_: tests.support.rollout_tasks.NeverScored}"
    sets = f"eval.sets={{good: {{num_prompts: 6}}, bad: {{num_prompts: 3, {broken}}}}}"
    with evaluation(sets, cwd=tmp_path) as process:
        code, out, _ = finish(process, root)
    assert code == 1 and "no result for bad;" in out
    summary = json.loads((root / "summary.json").read_text())
    assert 0 < summary["sets"]["good"]["avg"] <= 1 and "error" in summary["sets"]["bad"]
