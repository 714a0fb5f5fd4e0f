"""A supervised run: resumed it is the run that was not stopped, and ranks share its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from areal_like.config import Config, LoraConfig, from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from tests.support.families import is_trained, stored, write_family
from tests.support.launching import TEST_LIMIT_S, areal_like
from tests.support.offline import StopAfter, files_of, metrics_of
from tests.support.sft_model import addition_rows, write_rows, write_sft_model
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.models.tiny_chat import CHAT_TEMPLATE, chat_tokenizer
from trainer.offline.run import OfflineRun
from trainer.sft.training import SupervisedTraining

NUM_ROWS, BATCH_ROWS = 22, 5
NUM_STEPS = 9  # two epochs


def config_of(root: Path, name: str, **sft: Any) -> Config:
    settings: dict[str, Any] = {
        "name": name,
        "runs_dir": str(root / "runs"),
        "model": {"path": str(root / "model")},
        "sft": {
            "train": str(root / "train.jsonl"),
            "eval": str(root / "eval.jsonl"),
            "batch_rows": BATCH_ROWS,
            "num_epochs": 2,
            "eval_interval": 4,
            **sft,
        },
        "trainer": {"lr": 3e-3, "warmup_steps": 2, "checkpoint_interval": 4, "keep_checkpoints": 9},
    }
    return from_mapping(settings)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a model and rows."""
    write_sft_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", addition_rows("messages", NUM_ROWS, seed=1))
    write_rows(tmp_path / "eval.jsonl", addition_rows("messages", 5, seed=2))
    return tmp_path


def run(config: Config, *, resume: str = "", num_steps: int = 1000) -> RunPaths:
    object.__setattr__(config, "resume", resume)
    ranks = Ranks.alone()
    try:
        kind = SupervisedTraining()
        OfflineRun(kind, config, ranks, stopping=StopAfter(num_steps), started_s=0.0).run()
    finally:
        dist.destroy_process_group()
    return RunPaths.of(config)


def test_a_resumed_run_is_the_run_itself(root: Path) -> None:
    """Weights, moments, metrics and held-out losses are the same to the last bit."""
    whole = run(config_of(root, "whole"))
    rows = metrics_of(whole)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 7, 8]
    for line in whole.metrics.read_text().splitlines():
        row = json.loads(line)
        assert row["model_tflops_per_s"] > 0 and row["wait_data_s_min"] <= row["wait_data_s_max"]
        assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["step_s"])
    assert [row["num_rows"] for row in rows] == [5] * 8 + [4] and rows[-1]["epoch"] == 2
    assert rows[-1]["eval_loss"] < rows[3]["eval_loss"] and rows[-1]["lr"] < rows[1]["lr"]

    stopped = run(config_of(root, "stopped"), num_steps=6)
    summary = json.loads(stopped.summary.read_text())
    assert (summary["finished"], summary["steps"], summary["num_steps"]) == (False, 6, NUM_STEPS)
    for resume in ("latest", "step:4"):  # the second one trains steps 4 and 5 again
        resumed = run(config_of(root, "stopped"), resume=resume)
        assert metrics_of(resumed) == rows
        last = f"step_{NUM_STEPS:06d}"
        assert files_of(resumed.checkpoints / last) == files_of(whole.checkpoints / last)
        summaries = [json.loads(paths.summary.read_text()) for paths in (whole, resumed)]
        for each in summaries:
            del each["wall_seconds"], each["resumed_from_step"], each["model"]
        assert summaries[0] == summaries[1] and summaries[0]["finished"]

    with pytest.raises(ConfigError, match="trained on other rows, or in another order"):
        run(config_of(root, "stopped", batch_rows=4), resume="latest")
    longer = run(config_of(root, "stopped", num_epochs=3), resume="latest")
    assert len(metrics_of(longer)) == 14


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3_5", "glm4_moe"])
def test_what_is_not_trained_is_kept(root: Path, family: str) -> None:
    """Of a wrapped model and of a mixture with biased routers; also by a run that is resumed."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    write_family(family, root / "model", vocab_size=len(tokenizer), tokenizer=tokenizer)
    whole = run(config_of(root, "whole"))
    run(config_of(root, "stopped"), num_steps=6)
    resumed = run(config_of(root, "stopped"), resume="latest")
    assert metrics_of(resumed) == metrics_of(whole)
    assert metrics_of(whole)[-1]["eval_loss"] < metrics_of(whole)[3]["eval_loss"]
    last = f"step_{NUM_STEPS:06d}"
    assert files_of(resumed.checkpoints / last) == files_of(whole.checkpoints / last)
    before, after = stored(root / "model"), stored(whole.checkpoints / last)
    assert before.keys() == after.keys()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if not is_trained(name, family)} <= same
    # An expert that no token chooses stays as it is too.
    assert all(".experts." in name for name in same if is_trained(name, family))


@pytest.mark.timeout(TEST_LIMIT_S)
def test_two_ranks_learn_what_one_does(root: Path) -> None:
    """From the command line, as a user: the last line names the model for `areal-like run`."""
    check_two_ranks(root, name="default-sft")


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_context_group_learns_what_one_rank_does(root: Path) -> None:
    check_two_ranks(root, "name=context", "trainer.context_parallel=2", name="context")


def check_two_ranks(root: Path, *words: str, name: str) -> None:
    """The run of two ranks has the weights and losses of one rank. `name`: of that run."""
    alone = run(config_of(root, f"alone-{name}"))
    job = {"model": {"path": str(root / "model")}, "trainer": {"lr": 3e-3}}
    (root / "job.yaml").write_text(json.dumps(job))
    rows = f"train: {root}/train.jsonl, eval: {root}/eval.jsonl"
    done = areal_like(
        "sft",
        "job.yaml",
        f"sft={{{rows}, batch_rows: {BATCH_ROWS}, num_epochs: 2}}",
        "trainer.world_size=2",
        "trainer.warmup_steps=2",
        "eval.interval=5",
        *words,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = root / "runs" / name / "checkpoints" / f"step_{NUM_STEPS:06d}"
    assert done.stdout.splitlines()[-1] == f"model.path={checkpoint}"
    assert "eval.interval=5 has no effect" in done.stdout
    ours = load_file(alone.checkpoints / checkpoint.name / "model.safetensors")
    theirs = load_file(checkpoint / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.allclose(theirs[key], atol=2e-6), key
    losses = [
        [row["loss"] for row in metrics_of(paths)] for paths in (alone, RunPaths(checkpoint.parents[1]))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.chaos
def test_an_adapter_with_dropout_resumes_to_the_last_bit(root: Path) -> None:
    """Dropout is random and follows from the seed: in the loss of the steps, not in the held-out loss."""
    rows = {}
    for name, dropout in (("plain", 0.0), ("whole", 0.3), ("stopped", 0.3)):
        config = config_of(root, name)
        lora = LoraConfig(rank=4, alpha=8.0, dropout=dropout)
        config = replace(config, model=replace(config.model, lora=lora))
        paths = run(config, num_steps=6 if name == "stopped" else 1000)
        if name == "stopped":
            paths = run(config, resume="step:4")
        rows[name] = metrics_of(paths)
    assert rows["stopped"] == rows["whole"]
    last = f"step_{NUM_STEPS:06d}"
    whole, stopped = (root / "runs" / name / "checkpoints" / last for name in ("whole", "stopped"))
    assert files_of(whole) == files_of(stopped)
    assert all(".lora_" in name for name in load_file(whole / "adapter_model.safetensors"))
    # A new adapter changes nothing, and neither does its dropout.
    assert rows["plain"][0]["loss"] == rows["whole"][0]["loss"]
    assert rows["plain"][-1]["loss"] != rows["whole"][-1]["loss"]
    assert rows["whole"][-1]["eval_loss"] < rows["whole"][3]["eval_loss"]


@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_last_line_starts_a_run_from_an_adapter(root: Path) -> None:
    words = ["model.lora.rank=2", "model.lora.targets=[q_proj,v_proj]", "sft.num_steps=1", "name=x"]
    done = areal_like("sft", f"model.path={root}/model", f"sft.train={root}/train.jsonl", *words, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1]
    config = load_config(line.split())
    assert config.model.lora.path == str(root / "runs" / "x" / "checkpoints" / "step_000001")
    ranks = Ranks.alone()
    try:
        Policy.load(config.model.path, ranks, lora_settings=config.model.lora)
    finally:
        dist.destroy_process_group()


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_broken_row_of_any_rank_is_named(root: Path) -> None:
    rows = [*addition_rows("messages", 3, seed=1), {"messages": []}]
    source = write_rows(root / "broken.jsonl", rows)  # the last one is rank 1's
    done = areal_like(
        "sft", f"model.path={root}/model", f"sft.train={source}", "trainer.world_size=2", cwd=root
    )
    assert done.returncode == 2 and "broken.jsonl:4: `messages`" in done.stdout + done.stderr
    assert "RuntimeError" not in done.stdout + done.stderr
