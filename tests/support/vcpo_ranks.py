"""Ranks of a trainer with VCPO, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from areal_like.trajectory import Trajectory
from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import SHARES, last_gradient, main
from trainer.advantages.group import Grpo
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.objectives import build_objective
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.runner import StepRunner

VARIANTS: dict[str, dict[str, Any]] = {
    f"{norms}-{baseline}": {"norms": norms, "baseline": baseline}
    for norms in ("ghost", "exact", "proxy")
    for baseline in ("group", "batch")
} | {
    "ghost-others": {"leave_one_out": True},
    "ghost-scores": {"baseline_weights": "score"},
    "exact-batch-scores": {"norms": "exact", "baseline": "batch", "baseline_weights": "score"},
    "none": {"baseline": "none"},
    "ghost-masks": {
        "masks": [
            {"name": "opsm"},
            {"name": "band", "level": "token", "low": 0.8, "high": 1.2, "denominator": "kept"},
        ]
    },
    "proxy-batch-masks": {
        "norms": "proxy",
        "baseline": "batch",
        "masks": [{"name": "band", "low": 0.9, "high": 1.1}],
    },
}


def shares_of(variant: str) -> dict[str, list[int]]:
    """The splits of eight groups over ranks to test, by name."""
    return SHARES if variant == "ghost-group" else {"uneven": SHARES["uneven"]}


def make_runner(
    path: str,
    ranks: Ranks,
    *,
    dtype: torch.dtype = torch.float64,
    compute: str = "float32",
    budget_tokens: int = 60,
    checkpointing: bool = False,
    lr: float = 0.0,
    fp32_head: bool = False,
    **settings: Any,
) -> StepRunner:
    """Runs VCPO as published; `settings` may include `masks`. Adam's first moment is the last gradient."""
    policy = Policy.load(
        path,
        ranks,
        dtype=compute,
        chunk_tokens=16,
        gradient_checkpointing=checkpointing,
        master_dtype=dtype,
        fp32_head=fp32_head,
    )
    return StepRunner(
        policy,
        ShardedAdamW(policy, ranks, lr=lr, betas=(0.0, 0.9), max_grad_norm=0.0),
        ranks,
        objective=build_objective({"name": "vcpo", "baseline_weights": "gradient", **settings}),
        advantage=Grpo(),
        normalizer=Normalizer(name="token_mean", max_tokens=10),
        budget_tokens=budget_tokens,
    )


def gradient_of(
    runner: StepRunner, groups: list[list[Trajectory]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, gradient) of the second of two steps; the first checks that a step restores the policy."""
    runner.run(groups[:1], step=0)
    metrics = runner.run(groups, step=1)
    return metrics, last_gradient(runner)


def shares(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Runs every variant with an uneven split of eight groups, and the default variant with all splits."""
    for variant, settings in VARIANTS.items():
        for share, owners in shares_of(variant).items():
            runner = make_runner(path, ranks, checkpointing=share == "uneven", **settings)
            mine = [
                group for group, owner in zip(random_groups(8), owners, strict=True) if owner == ranks.rank
            ]
            metrics, gradient = gradient_of(runner, mine)
            if ranks.rank == 0:
                save_file(
                    {k: v.contiguous() for k, v in gradient.items()},
                    out_dir / f"{variant}-{share}.safetensors",
                )
                (out_dir / f"{variant}-{share}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(shares=shares)
