"""Ranks that measure the memory of real optimizer steps and compare it with the planner's trace."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from areal_like.config import Config, from_mapping
from areal_like.trajectory import FinishReason, Trajectory
from tests.support.memory import peak, release_freed_memory, reset_peak
from tests.support.trainer_ranks import main
from trainer.distributed.ranks import Ranks
from trainer.models.policy import build_policy
from trainer.planning.lengths import Lengths, lengths_of, worst_lengths
from trainer.planning.shapes import with_local_model
from trainer.planning.trace import trace_step
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner


def memory(ranks: Ranks, out_dir: Path, settings: str) -> None:
    """Writes the measured and the traced peak of a rank, in bytes, to `rank-N.json`."""
    # Before the first large block is freed: glibc would put it in a list, and make later ones from it.
    release_freed_memory()
    config, shape = with_local_model(from_mapping(json.loads(settings)))
    trainer = config.trainer
    ranks = Ranks(context_parallel=trainer.context_parallel, replicas=trainer.replicas)
    lengths = lengths_of(config, max_positions=shape.max_positions)
    # Once before: libraries, threads and work buffers stay.
    run_steps(build_runner(config, ranks), config, lengths, ranks, microbatches=[1])
    gc.collect()
    release_freed_memory()
    before = reset_peak()
    run_steps(build_runner(config, ranks), config, lengths, ranks, microbatches=[1, 2])
    measured = peak() - before
    rank = ranks.rank
    dist.destroy_process_group()
    trace = trace_step(config, shape, lengths)
    result = {"measured": measured, "traced": trace.peak, "parts": trace.peak_bytes}
    (out_dir / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)  # closed by the caller


def build_runner(config: Config, ranks: Ranks) -> StepRunner:
    """The configured runner with random weights."""
    policy = build_policy(config, config.model.path, ranks, with_weights=False)
    with torch.no_grad():
        for param in policy.parameters():
            param.normal_(std=0.02)
    return build_step_runner(config, policy, ranks)


def run_steps(
    runner: StepRunner, config: Config, lengths: Lengths, ranks: Ranks, *, microbatches: list[int]
) -> list[dict[str, Any]]:
    """Steps of so many micro-batches on each data rank, as the trace assumes them; returns their metrics."""
    packed = worst_lengths(lengths, budget_tokens=config.trainer.tokens_per_microbatch)
    group = [
        sample(length, response=min(length - 1, lengths.max_response), reward=float(index % 2), first=index)
        for index, length in enumerate(packed)
    ]
    found = []
    for step, number in enumerate(microbatches):
        metrics = runner.run([group] * (number * ranks.has_samples), step=step)
        assert metrics["num_microbatches"] == number * ranks.num_data, metrics
        found.append(dict(metrics))
    return found


def sample(length: int, *, response: int, reward: float, first: int) -> Trajectory:
    """A trajectory of `length` tokens from `first` on, whose last `response` are sampled."""
    mask = np.zeros(length, dtype=np.uint8)
    mask[length - response :] = 1
    return Trajectory(
        tokens=np.arange(first, first + length, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -9.0, 0.0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=reward,
        finish_reason=FinishReason.STOP,
    )


if __name__ == "__main__":
    main(memory=memory)
