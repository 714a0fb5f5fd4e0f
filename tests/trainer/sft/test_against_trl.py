"""Losses, gradients and held-out losses of supervised steps against those that TRL's SFTTrainer had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_like.config import Config, from_mapping
from tests.support.sft_model import write_rows, write_sft_model
from tests.trainer.sft.record_trl import BATCH_ROWS, FILE, TEMPLATES
from trainer.distributed.ranks import Ranks
from trainer.models.policy import build_policy
from trainer.offline.plan import StepPlan
from trainer.offline.rows import conversation_tokens, longest_sequence
from trainer.offline.step import OfflineStep
from trainer.optimizer import ShardedAdamW
from trainer.sft.rows import SftRows
from trainer.sft.step import SupervisedLoss

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("kind", TEMPLATES)
def test_steps_have_the_losses_of_trl(kind: str, tmp_path: Path) -> None:
    """Multi-turn replies with tool calls, texts, and conversations without marked replies."""
    case = RECORDED["cases"][kind]
    settings: dict[str, Any] = {
        "model": {"path": write_sft_model(tmp_path / "model", template=TEMPLATES[kind])},
        "seed": 3,
        "sft": {
            "train": write_rows(tmp_path / "train.jsonl", case["rows"]),
            "eval": write_rows(tmp_path / "eval.jsonl", case["eval_rows"]),
            "batch_rows": BATCH_ROWS,
        },
        "trainer": {"lr": RECORDED["lr"], "warmup_steps": 0, "lr_schedule": "constant"},
    }
    config: Config = from_mapping(settings)
    ranks = Ranks.alone()
    try:
        tokens = conversation_tokens(config, config.model.path)
        longest = longest_sequence(config, config.sft, config.model.path)
        sources = {"sft.train": config.sft.train, "sft.eval": config.sft.eval}
        rows, held_out = (
            SftRows(config, source, key=key, tokens=tokens, longest=longest, ranks=ranks)
            for key, source in sources.items()
        )
        plan = StepPlan.of(config.sft, rows.num_tokens_N, seed=config.seed, rows=rows.fingerprint)
        assert [plan.rows(step) for step in range(plan.num_steps)] == case["order"]

        policy = build_policy(config, config.model.path, ranks)
        optimizer = ShardedAdamW.of(config.trainer, policy, ranks, lr=config.trainer.lr)
        budget = max(len(row.tokens) for at in range(len(case["rows"])) for row in rows.sequences(at)) + 9
        runner = OfflineStep(SupervisedLoss(policy), optimizer, ranks, budget_tokens=budget)
        units = [unit for at in range(len(case["eval_rows"])) for unit in held_out.units(at)]
        assert runner.measure(units)[0]["loss"] == pytest.approx(case["eval_loss_before"], abs=1e-5)
        for step, indices in enumerate(case["order"]):
            batch = [unit for index in indices for unit in rows.units(index)]
            metrics = runner.train(batch, step=step)
            assert metrics["num_microbatches"] > 1
            assert metrics["loss"] == pytest.approx(case["loss"][step], abs=1e-5)
            assert metrics["grad_norm"] == pytest.approx(case["grad_norm"][step], rel=1e-4)
            assert runner.measure(units)[0]["loss"] == pytest.approx(case["eval_loss"][step], abs=1e-5)
    finally:
        dist.destroy_process_group()
