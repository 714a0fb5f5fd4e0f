"""Ranks of a real trainer in context groups, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR ...`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from areal_like.config import LoraConfig
from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import flattened, joined, random_groups, without_measured
from tests.support.trainer_ranks import DTYPES, main, make_runner
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.step.runner import StepRunner

NUM_STEPS = 3


def step_groups(step: int) -> list[list[Trajectory]]:
    """Six groups with common prompts, some with equal rewards; samples of several segments, one too long to
    be packed into a micro-batch of 48 tokens."""
    groups = random_groups(6, prompt=6, seed=step)
    groups[1][0] = joined(groups[1])
    groups[2][1] = joined([*groups[2], *groups[4], *groups[5]])
    return groups


def case_runner(path: str, ranks: Ranks, case: dict[str, Any]) -> StepRunner:
    """`case`: arguments of `make_runner`, in JSON."""
    arguments = {"budget_tokens": 48, "max_grad_norm": 1.0, **case}
    if "lora" in arguments:
        arguments["lora"] = LoraConfig(**arguments["lora"])
    arguments["dtype"] = DTYPES[arguments.get("dtype", "float64")]
    return make_runner(path, ranks, **arguments)


def run_steps(runner: StepRunner, ranks: Ranks, steps: Sequence[int]) -> list[dict[str, float]]:
    """Trains these steps; returns their metrics, without times."""
    found = []
    for step in steps:
        groups = step_groups(step)
        mine = [groups[at] for at in ranks.share_of(len(groups))]
        metrics = runner.run(mine, step=step, num_groups=len(groups))
        found.append(flattened(without_measured(metrics)))
    return found


def weights_of(runner: StepRunner) -> dict[str, torch.Tensor]:
    """On rank 0: the weights of policy and critic. Collective."""
    models: dict[str, PackedModel] = {"policy": runner.policy}
    if runner.critic is not None:
        models["critic"] = runner.critic.model
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in models.items()
        for key, tensor in gather_full_state(model)
    }


def cases(world: Ranks, out_dir: Path, size: str, path: str, text: str) -> None:
    """Trains some steps in each case; writes weights and metrics."""
    ranks = Ranks(context_parallel=int(size))
    for index, case in enumerate(json.loads(text)):
        runner = case_runner(path, ranks, case)
        metrics = run_steps(runner, ranks, range(NUM_STEPS))
        weights = weights_of(runner)
        if ranks.rank == 0:
            save_file(weights, out_dir / f"{index}.safetensors")
            (out_dir / f"{index}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(cases=cases)
