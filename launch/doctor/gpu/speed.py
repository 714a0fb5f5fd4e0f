"""Stage `speed`: memory, tokens/s and MFU of real steps against what `areal-like plan` predicts for them.

One rank trains the largest model of configs/scale/models/ that fits, with random weights: first micro-batches
whose attention pads most, which have the peak of memory, then sequences of the mean length that the plan
assumes. Everything runs as in a job except that samples are made up. A plan's speed is an estimate from
assumed efficiencies, so only half of it is demanded; its memory is traced, so a tenth more fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from areal_like.automatic_settings import resolved
from areal_like.config import Config, from_mapping
from areal_like.gpus import kind_of
from areal_like.trajectory import Trajectory
from launch.doctor.gpu.models import sampled
from launch.doctor.gpu.stages import OK, Measured, Notes, Request, Verdict, failed
from trainer.distributed.process_group import device_of, join_ranks
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import build_policy
from trainer.planning.lengths import Lengths, lengths_of, worst_lengths
from trainer.planning.planner import make_plan
from trainer.planning.shapes import SHAPES, ModelShape, with_local_model
from trainer.planning.trace import trace_step
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner

LEAST_SPEED = 0.5
"""Share of the planned tokens/s and MFU."""
MOST_MEMORY = 1.1
"""Share of the traced peak."""
_USABLE = 0.85
"""Share of a GPU's free memory that the traced peak may take."""
_MODELS = ("qwen3-1.7b", "qwen3-0.6b")
_MICROBATCHES = 4
"""Micro-batches of a step whose time is taken."""
_STEPS = 3
"""Timed steps, of which the fastest counts: a single one was up to 30 % slower."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The plan of this step; None where `plan` has no figures for the GPU."""

    peak_bytes: float
    tokens_per_s: float | None = None
    mfu: float | None = None


def check_speed(request: Request, notes: Notes) -> Verdict:
    """Plans a step, runs it and compares."""
    device = torch.device("cuda", 0) if request.device == "cuda" else torch.device("cpu")
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
    for name in _MODELS if device.type == "cuda" else ("tiny",):
        notes.at(f"tracing a step of {name}")
        config, shape = with_local_model(settings_of(name, request))
        lengths = lengths_of(config, max_positions=shape.max_positions)
        predicted = predict(config, shape, lengths, device)
        if predicted.peak_bytes < _USABLE * free_bytes:
            break
    else:
        return failed(
            f"{free_bytes / 1e9:.1f} GB are free, a step of {name} needs {predicted.peak_bytes / 1e9:.1f} GB",
            "stop other users of the GPU",
        )
    notes.measured(model=name, planned_peak_gb=round(predicted.peak_bytes / 1e9, 2))
    notes.at(f"training {name}")
    found = run_steps(resolved(config), lengths, times=_STEPS)
    notes.measured(**found)
    if predicted.tokens_per_s is not None and predicted.mfu is not None:
        notes.measured(
            planned_tokens_per_s=round(predicted.tokens_per_s), planned_mfu=round(predicted.mfu, 3)
        )
    return judged(found, predicted, is_measured=device.type == "cuda")


def judged(found: Mapping[str, Measured], predicted: Predicted, *, is_measured: bool) -> Verdict:
    """Compares the metrics of a step with the plan. `is_measured`: the peak is that of a GPU."""
    if not float(found["tokens_per_s"]) > 0:
        return failed("the step has trained on no token", "send us the file")
    peak_bytes = 1e9 * float(found["peak_gb"])
    if is_measured and peak_bytes > MOST_MEMORY * predicted.peak_bytes:
        return failed(
            f"the step has used {peak_bytes / 1e9:.1f} GB, planned are {predicted.peak_bytes / 1e9:.1f} GB",
            "leave more room than `areal-like plan` asks for, and send us the file",
        )
    for name, least in (("tokens_per_s", predicted.tokens_per_s), ("mfu", predicted.mfu)):
        if least is not None and float(found[name]) < LEAST_SPEED * least:
            return failed(
                f"{name} is {float(found[name]):.3g}, planned is {least:.3g}",
                "stop other users of the GPU, see its clocks (nvidia-smi -q -d CLOCK), and send us the file",
            )
    return OK


def settings_of(model: str, request: Request, **trainer: Any) -> Config:
    """A job whose sequences have up to 4096 tokens, on one GPU. `trainer`: further settings of it."""
    is_small = request.device == "cpu"
    context = 128 if is_small else 4096
    settings: dict[str, Any] = {
        "runs_dir": request.scratch,
        "name": "speed",
        "model": {"path": str(SHAPES / model), "dtype": "float32" if is_small else "bfloat16"},
        "task": {"name": "sort", "max_prompt_tokens": context // 4},
        "sampling": {"max_new_tokens": context // 4 * 3, "group_size": 4},
        "rollout": {"max_context": context},
        "objective": {"name": "reinforce"},
        "trainer": {
            "device": request.device,
            "groups_per_step": 8,
            "tokens_per_microbatch": 256 if is_small else 16384,
            "gradient_checkpointing": True,
            **trainer,
        },
    }
    return from_mapping(settings)


def predict(config: Config, shape: ModelShape, lengths: Lengths, device: torch.device) -> Predicted:
    """What `areal-like plan` says of these steps, as far as it knows the device."""
    kind = kind_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if kind is None:
        return Predicted(peak_bytes=trace_step(resolved(config), shape, lengths).peak)
    plan = make_plan(config, gpus=f"1+1x{kind.name}")
    if plan.estimate is None:
        return Predicted(peak_bytes=plan.trace.peak)
    return Predicted(
        peak_bytes=plan.trace.peak, tokens_per_s=plan.estimate.trainer_tokens_per_s, mfu=plan.estimate.mfu
    )


def run_steps(
    config: Config, lengths: Lengths, *, times: int = 1, around: AbstractContextManager[Any] | None = None
) -> dict[str, Measured]:
    """tokens_per_s, mfu (where the GPU's peak is known) and peak_gb.

    `times`: number of timed steps, of which the fastest counts. `around`: one more micro-batch runs in it.
    """
    device = device_of(config)
    join_ranks(config, device)
    ranks = Ranks(device=device)
    policy = build_policy(config, config.model.path, ranks, with_weights=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            local(parameter).normal_(std=0.02)
    runner = build_step_runner(config, policy, ranks)
    budget = config.trainer.tokens_per_microbatch
    padded = worst_lengths(lengths, budget_tokens=budget)
    _step(runner, padded, lengths, times=1, step=0)  # makes the optimizer's moments
    peak = _step(runner, padded, lengths, times=2, step=1)["memory_peak_gb"]
    mean = round(lengths.mean)
    even = (mean,) * (budget // mean)
    _step(runner, even, lengths, times=1, step=2)
    steps = [_step(runner, even, lengths, times=_MICROBATCHES, step=3 + index) for index in range(times)]
    metrics = max(steps, key=lambda step: float(step["compute_tokens_per_s_per_gpu"]))
    if around is not None:
        with around:
            _step(runner, even, lengths, times=1, step=3 + times)
    dist.destroy_process_group()
    found: dict[str, Measured] = {
        "tokens_per_s": round(metrics["compute_tokens_per_s_per_gpu"]),
        "peak_gb": round(peak, 3),
        "model_tflops_per_s": round(metrics["model_tflops_per_s"], 4),
    }
    if "mfu_compute" in metrics:
        found["mfu"] = round(metrics["mfu_compute"], 3)
    return found


def _step(
    runner: StepRunner, sizes: tuple[int, ...], lengths: Lengths, *, times: int, step: int
) -> dict[str, Any]:
    """The metrics of a step of so many micro-batches of sequences of these lengths."""
    group = [_sample(size, lengths, index) for index, size in enumerate(sizes)]
    if len(group) == 1:  # equal rewards would give no gradient
        group = [*group, _sample(2, lengths, 1)]
    return dict(runner.run([group] * times, step=step))


def _sample(size: int, lengths: Lengths, index: int) -> Trajectory:
    """A sample of `size` tokens, the last of them sampled; no two share a prefix."""
    response = min(size - 1, lengths.max_response)
    tokens = np.arange(3 + index, 3 + index + size) % 48
    return sampled(tokens[:-response], tokens[-response:], logprobs=None, reward=float(index % 2))
