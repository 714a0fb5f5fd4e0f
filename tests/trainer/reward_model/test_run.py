"""A reward model learns to tell sorted digits from others, and is transformers' model of the same scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from areal_like.chat.scored_text import scored_tokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, checkpoint_name
from areal_like.sorting import Split
from tests.support.offline import StopAfter, files_of, metrics_of
from tests.support.preferences import sorting_pairs
from tests.support.sft_model import write_rows
from trainer.batching.packing import collate
from trainer.distributed.ranks import Ranks
from trainer.models.reward_model import RewardModel, pad_token_id
from trainer.models.tiny import character_tokenizer, untrained_model
from trainer.offline.rows import training_sample
from trainer.offline.run import OfflineRun
from trainer.reward_model.training import RewardTraining

NUM_STEPS = 80
"""Enough for one layer that its bounds hold for every seed tried, however sums are rounded; two layers need
more."""


def config_of(root: Path, name: str, *, model: str = "model", **settings: Any) -> Config:
    return from_mapping(
        {
            "name": name,
            "runs_dir": str(root / "runs"),
            "model": {"path": str(root / model)},
            "reward_model": {
                "train": str(root / "train.jsonl"),
                "eval": str(root / "eval.jsonl"),
                "batch_rows": 48,
                "num_steps": NUM_STEPS,
                "eval_interval": 40,
                **settings,
            },
            "trainer": {"lr": 4e-3, "warmup_steps": 5, "checkpoint_interval": 10, "keep_checkpoints": 9},
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained language model and pairs of answers to the sorting task."""
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = character_tokenizer()
    untrained_model(tokenizer, seed=0, hidden_size=64, num_layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", sorting_pairs(48 * NUM_STEPS, seed=1))
    write_rows(folder / "eval.jsonl", sorting_pairs(150, seed=1, split=Split.HELD_OUT))
    return folder


def run(config: Config, *, resume: str = "", num_steps: int = 1000) -> RunPaths:
    object.__setattr__(config, "resume", resume)
    ranks = Ranks.alone()
    try:
        kind = RewardTraining()
        OfflineRun(kind, config, ranks, stopping=StopAfter(num_steps), started_s=0.0).run()
    finally:
        dist.destroy_process_group()
    return RunPaths.of(config)


@pytest.fixture(scope="module")
def trained(root: Path) -> RunPaths:
    return run(config_of(root, "whole"))


def newest(paths: RunPaths) -> Path:
    return Path(json.loads(paths.summary.read_text())["model"])


def test_it_learns_which_answers_are_sorted(trained: RunPaths) -> None:
    """On digits that are in no row of the training."""
    summary = json.loads(trained.summary.read_text())
    assert summary["eval_accuracy_before"] == 0.5 and summary["eval_loss_before"] == pytest.approx(
        0.6931, abs=1e-4
    )
    assert summary["eval_accuracy_after"] > 0.85 and summary["eval_margin_after"] > 1
    assert summary["eval_ece_after"] < 0.2
    assert sum(each["num_pairs"] for each in summary["eval_reliability"]) == 150
    row = metrics_of(trained)[-1]
    assert {"accuracy", "margin", "score_mean", "score_std", "num_pairs", "eval_ece"} <= row.keys()
    assert row["tokens_trained"] == row["num_tokens"] and row["shared_share"] > 0.2


def test_transformers_loads_it_with_the_same_scores(root: Path, trained: RunPaths) -> None:
    """In a batch with padding on the right, as other programs score."""
    path = newest(trained)
    assert not list(path.glob("*.bin")) and (path / "tokenizer.json").exists()
    theirs = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = sorting_pairs(8, seed=3)
    texts = [(row["prompt"], row[key]) for row in rows for key in ("chosen", "rejected")]
    tokens = [scored_tokens(tokenizer, *text, pad_token_id=pad_token_id(str(path))) for text in texts]
    padded = tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
    with torch.no_grad():
        expected_N = theirs(**padded).logits[:, 0]
    ours_N = scores(path, tokens)
    assert ours_N.std() > 0.5 and torch.allclose(ours_N, expected_N, atol=1e-5)


def scores(path: Path, tokens: list[list[int]]) -> torch.Tensor:
    ranks = Ranks.alone()
    try:
        model = RewardModel.load(str(path), ranks)
        rows = [TokenRow(tokens=each, loss_mask=[0] * (len(each) - 1) + [1]) for each in tokens]
        with torch.no_grad():
            found: torch.Tensor = model(collate([training_sample(row) for row in rows]))
            return found
    finally:
        dist.destroy_process_group()


@pytest.mark.chaos
def test_a_resumed_run_is_the_run_itself(root: Path, trained: RunPaths) -> None:
    """From a checkpoint in the middle, as if the run had ended after it."""
    config = config_of(root, "stopped")
    shutil.copytree(trained.root, RunPaths.of(config).root)
    shutil.rmtree(RunPaths.of(config).checkpoints / checkpoint_name(NUM_STEPS))
    resumed = run(config, resume="auto")
    assert metrics_of(resumed) == metrics_of(trained)
    assert files_of(newest(resumed)) == files_of(newest(trained))
    summaries = [json.loads(paths.summary.read_text()) for paths in (trained, resumed)]
    assert summaries[0]["eval_reliability"] == summaries[1]["eval_reliability"]


@pytest.mark.chaos
def test_it_continues_from_a_reward_model(root: Path, trained: RunPaths) -> None:
    """Also of others: theirs have another padding token, or none, and several files."""
    other = root / "other"
    AutoTokenizer.from_pretrained(newest(trained)).save_pretrained(other)
    theirs = AutoModelForSequenceClassification.from_pretrained(newest(trained))
    theirs.config.pad_token_id = None
    theirs.save_pretrained(other, max_shard_size="100KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    again = run(config_of(root, "again", model="other", num_steps=1))
    before = json.loads(trained.summary.read_text())["eval_loss_after"]
    assert json.loads(again.summary.read_text())["eval_loss_before"] == pytest.approx(before, abs=1e-6)
    assert json.loads((newest(again) / "config.json").read_text())["pad_token_id"] is None


def test_models_that_cannot_be_used_are_refused(root: Path, trained: RunPaths, tmp_path: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(newest(trained))
    theirs.config.num_labels = 3
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the model has 3 labels"):
        RewardModel.build(str(tmp_path))
    theirs.config.num_labels = 1
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lack score\.weight"):
        RewardModel.build(str(tmp_path)).check_initial_weights()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"its weights are pickles"):
        RewardModel.build(str(tmp_path)).check_initial_weights()
    config = config_of(root, "adapter")
    object.__setattr__(config.model.lora, "rank", 2)
    with pytest.raises(ConfigError, match="a reward model is trained whole"):
        run(config)
