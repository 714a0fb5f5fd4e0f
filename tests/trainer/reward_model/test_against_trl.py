"""Losses, gradients and measures of steps against those that TRL's RewardTrainer had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_like.config import Config, from_mapping
from tests.support.sft_model import write_rows
from tests.trainer.reward_model.record_trl import BATCH_ROWS, CENTER_COEFS, FILE, write_reward_model
from trainer.distributed.ranks import Ranks
from trainer.offline.plan import StepPlan
from trainer.offline.step import OfflineStep
from trainer.optimizer import ShardedAdamW
from trainer.reward_model.training import RewardTraining

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("kind", CENTER_COEFS)
def test_steps_have_the_losses_of_trl(kind: str, tmp_path: Path) -> None:
    """Texts with margins and centering, and conversations without a prompt of their own."""
    case = RECORDED["cases"][kind]
    settings: dict[str, Any] = {
        "model": {"path": write_reward_model(tmp_path / "model", kind=kind)},
        "seed": 3,
        "reward_model": {
            "train": write_rows(tmp_path / "train.jsonl", case["rows"]),
            "eval": write_rows(tmp_path / "eval.jsonl", case["eval_rows"]),
            "batch_rows": BATCH_ROWS,
            "center_coef": CENTER_COEFS[kind],
        },
        "trainer": {
            **{"lr": RECORDED["lr"], "warmup_steps": 0, "lr_schedule": "constant"},
            "tokens_per_microbatch": 100,
        },
        "rollout": {"max_context": 100},
        "sampling": {"max_new_tokens": 50},
    }
    config: Config = from_mapping(settings)
    training, source, ranks = RewardTraining(), config.model.path, Ranks.alone()
    try:
        rows, held_out = (training.rows(config, source, key, ranks) for key in ("train", "eval"))
        plan = StepPlan.of(config.reward_model, rows.num_tokens_N, seed=config.seed, rows=rows.fingerprint)
        assert [plan.rows(step) for step in range(plan.num_steps)] == case["order"]
        model = training.model(config, source, ranks, with_weights=True)
        optimizer = ShardedAdamW.of(config.trainer, model, ranks, lr=config.trainer.lr)
        loss = training.loss(config, model, ranks)
        runner = OfflineStep(loss, optimizer, ranks, budget_tokens=config.trainer.tokens_per_microbatch)
        measured = [unit for at in range(len(case["eval_rows"])) for unit in held_out.units(at, group=at)]
        assert runner.measure(measured)[0]["loss"] == pytest.approx(case["eval_loss_before"], abs=1e-5)
        for step, indices in enumerate(case["order"]):
            units = [unit for at, index in enumerate(indices) for unit in rows.units(index, group=at)]
            metrics = runner.train(units, step=step)
            assert metrics["num_microbatches"] > 1 and metrics["num_pairs"] == BATCH_ROWS
            for name in ("loss", "accuracy", "margin"):
                assert metrics[name] == pytest.approx(case[name][step], abs=1e-5), name
            assert metrics["grad_norm"] == pytest.approx(case["grad_norm"][step], rel=1e-4)
            assert runner.measure(measured)[0]["loss"] == pytest.approx(case["eval_loss"][step], abs=1e-5)
    finally:
        dist.destroy_process_group()
