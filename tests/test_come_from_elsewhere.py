"""docs/guides/come-from-elsewhere.md: its jobs run, with the files and the commands of the page.

The two commands with the tiny model are run. The translated files are also compared with the script and the
YAML that they translate.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal_like.runtime.command_line import load_config
from launch.audit.run import audit_run
from tests.support.launching import ROOT, TEST_LIMIT_S, areal_like
from tests.support.preferences import sorting_pairs
from tests.support.sft_model import write_rows

PAGE = (ROOT / "docs" / "guides" / "come-from-elsewhere.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)```", PAGE, re.S))
COMMANDS = re.findall(r"^areal-like (run .*)$", PAGE, re.M)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and the rows that its script writes."""
    pytest.importorskip("pyarrow", reason="needs areal-like[data]")
    directory = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        runpy.run_path("make_sums.py")
    return directory


def test_the_page_has_a_script_and_a_job_for_each() -> None:
    assert set(FILES) == {
        "make_sums.py",
        "sum_rewards.py",
        "train_grpo.py",
        "trl_job.yaml",
        "train_dpo.py",
        "dpo_job.yaml",
        "sum_score.py",
        "verl.yaml",
        "verl_job.yaml",
    }
    jobs = [shlex.split(command)[2] for command in COMMANDS]
    assert jobs == ["trl_job.yaml", "trl_job.yaml", "verl_job.yaml", "verl_job.yaml"]


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("number", "rewards"), [(1, {"correct", "digits"}), (3, {"compute_score"})], ids=["trl", "verl"]
)
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_translated_job_runs(
    number: int, rewards: set[str], directory: Path, cache: dict[str, str]
) -> None:
    words = shlex.split(COMMANDS[number])
    assert "model.path=tiny" in words
    run = areal_like(*words, cwd=directory, environment=cache | {"PYTHONPATH": f"{ROOT}:{directory}"})
    assert run.returncode == 0, run.stdout + run.stderr
    config = load_config(["--config", str(directory / words[2]), *words[3:]])
    root = directory / "runs" / config.name
    assert audit_run(root).is_clean
    summary = json.loads((root / "summary.json").read_text())
    assert summary["tickets"]["trained"] == config.trainer.num_steps * config.trainer.groups_per_step
    assert not summary["selection"].get("failures")
    steps = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [step["lag_max"] <= config.max_staleness for step in steps] == [True] * 3
    assert set(steps[-1]["reward_parts"]) == rewards
    told = {"digits/characters"} if number == 1 else {"compute_score/characters"}
    assert set(steps[-1]["sample_metrics"]) == told


def arguments_of(name: str, *, file: str) -> dict[str, Any]:
    """The arguments of a call in a file."""
    (call,) = (
        node
        for node in ast.walk(ast.parse(FILES[file]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    )
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def test_the_trl_job_has_the_values_of_the_script(directory: Path) -> None:
    theirs = arguments_of("GRPOConfig", file="train_grpo.py")
    ours = load_config(["--config", str(directory / "trl_job.yaml")])
    trainer, completions = ours.trainer, theirs["per_device_train_batch_size"]
    completions *= theirs["gradient_accumulation_steps"]
    assert completions == trainer.groups_per_step * ours.sampling.group_size
    assert ours.sampling.group_size == theirs["num_generations"]
    assert ours.sampling.max_new_tokens == theirs["max_completion_length"]
    assert [entry.get("weight", 1.0) for entry in ours.task["reward"]] == theirs["reward_weights"]
    assert (trainer.lr, trainer.lr_schedule) == (theirs["learning_rate"], theirs["lr_scheduler_type"])
    assert (trainer.warmup_steps, trainer.num_steps) == (theirs["warmup_steps"], theirs["max_steps"])
    assert (ours.kl.coef, ours.seed) == (theirs["beta"], theirs["seed"])
    assert ours.eval.interval == theirs["eval_steps"]
    assert trainer.checkpoint_interval == theirs["save_steps"]
    table = PAGE.split("## From verl")[0]
    assert [name for name in theirs if f"`{name}`" not in table] == []


def test_the_dpo_job_has_the_values_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "dpo_job.yaml").write_text(FILES["dpo_job.yaml"])
    theirs = arguments_of("DPOConfig", file="train_dpo.py")
    ours = load_config(["--config", str(tmp_path / "dpo_job.yaml")])
    trainer, preferences = ours.trainer, ours.preferences
    rows = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    assert (preferences.method, preferences.batch_rows) == ("dpo", rows)
    assert (preferences.beta, preferences.num_epochs) == (theirs["beta"], theirs["num_train_epochs"])
    assert (preferences.max_row_tokens, preferences.eval_interval) == (
        theirs["max_length"],
        theirs["eval_steps"],
    )
    assert (trainer.lr, trainer.lr_schedule) == (theirs["learning_rate"], theirs["lr_scheduler_type"])
    assert (trainer.warmup_steps, ours.seed) == (theirs["warmup_steps"], theirs["seed"])
    assert trainer.checkpoint_interval == theirs["save_steps"]
    table = PAGE.split("## From verl")[0]
    assert [name for name in theirs if f"`{name}`" not in table] == []


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_dpo_job_runs(tmp_path: Path, cache: dict[str, str]) -> None:
    """With the tiny model, on rows of the shape that the script reads."""
    (tmp_path / "dpo_job.yaml").write_text(FILES["dpo_job.yaml"])
    for name in ("pairs", "held_out"):
        write_rows(tmp_path / f"{name}.jsonl", sorting_pairs(40, seed=len(name)))
    words = ("dpo_job.yaml", "model={path: tiny, warm_start_steps: 0}", "preferences.num_steps=2")
    done = areal_like("preferences", *words, cwd=tmp_path, environment=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "taste-preferences" / "summary.json").read_text())
    assert summary["finished"] and summary["eval_loss_before"] == pytest.approx(0.6931, abs=1e-3)


def test_the_verl_job_has_the_values_of_the_yaml(directory: Path) -> None:
    theirs = yaml.safe_load(FILES["verl.yaml"])
    ours = load_config(["--config", str(directory / "verl_job.yaml")])
    actor, rollout = theirs["actor_rollout_ref"]["actor"], theirs["actor_rollout_ref"]["rollout"]
    data, trainer = theirs["data"], theirs["trainer"]
    steps = data["train_batch_size"] // actor["ppo_mini_batch_size"]
    assert ours.trainer.groups_per_step == actor["ppo_mini_batch_size"]
    assert ours.max_staleness == steps - 1
    assert ours.trainer.num_steps * ours.trainer.groups_per_step == trainer["total_epochs"] * 800
    assert ours.trainer.checkpoint_interval == trainer["save_freq"] * steps
    assert ours.eval.interval == trainer["test_freq"] * steps
    assert (ours.trainer.lr, ours.kl.coef) == (actor["optim"]["lr"], actor["kl_loss_coef"])
    assert ours.sampling.group_size == rollout["n"]
    assert ours.sampling.max_new_tokens == data["max_response_length"]
    assert ours.task["max_prompt_tokens"] == data["max_prompt_length"]
    assert ours.task["train"] == data["train_files"] and ours.task["eval"] == data["val_files"]
    reward = theirs["custom_reward_function"]
    assert ours.task["reward"] == f"{Path(reward['path']).stem}.{reward['name']}"
    table = PAGE.split("## From verl")[1]
    assert [key for key in leaves(theirs) if key not in table] == []


def leaves(settings: dict[str, Any]) -> list[str]:
    """The last names of all settings."""
    found = []
    for key, value in settings.items():
        found += leaves(value) if isinstance(value, dict) else [key]
    return found
