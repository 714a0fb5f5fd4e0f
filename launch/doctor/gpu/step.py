"""Stage `step`: the gradient of one step over all ranks against that of one float32 rank on the CPU.

The ranks are started, meet and shard as those of a job (`trainer.distributed`); `python -m
launch.doctor.gpu.step FILE` is one of them. The gradient is Adam's first moment after a step with beta 0. The
step runs in float32, where only the order of sums differs, and in bfloat16, where rounding does. The ranks
also gather their weights as for a push.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from areal_like.automatic_settings import resolved
from areal_like.config import Config, from_mapping
from areal_like.runtime.process import exit_at_once
from areal_like.weights.buckets import checksum, unflatten
from areal_like.weights.untrained import text_config
from launch.doctor.gpu.models import random_groups, write_model
from launch.doctor.gpu.stages import OK, Notes, Outcome, Request, Verdict, failed, within
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import MODEL_PREFIX, gather, shards_of
from trainer.distributed.spawn import start_ranks
from trainer.metrics.speed import clock_of
from trainer.models.policy import Policy, build_policy
from trainer.step.build import build_step_runner
from trainer.step.runner import StepRunner
from trainer.weights.snapshot import BoundaryGather

LIMITS = {"float32": 3e-4, "bfloat16": 0.08}
"""Largest norm of the difference between two gradients, as a share of the exact one's norm. TensorFloat32,
which torch leaves off, would give 1e-3."""
_NUM_GROUPS = 4
_REDUCED_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 27}
_BUCKET_BYTES = {"cpu": 1 << 13, "cuda": 1 << 26}
_REMEDY = "rerun with CUDA_VISIBLE_DEVICES=0, to see whether one rank alone differs, and send us both files"


def check_step(request: Request, notes: Notes) -> Verdict:
    """Runs the step on the CPU and over the ranks of this machine, and compares."""
    scratch, is_small = Path(request.scratch), request.device == "cpu"
    path = write_model(scratch / "step-model", is_small=is_small, dtype=torch.float32)
    exact = settings_of(path, scratch, device="cpu", world_size=1, dtype="float32", is_small=is_small)
    notes.at("the step of one rank on the CPU")
    want = gradient_of(step_of(exact, Ranks.alone(), is_small=is_small))
    dist.destroy_process_group()
    for world_size in _world_sizes(request.device):
        notes.at(f"the step of {world_size} ranks on {request.device}")
        verdict = _compare(request, notes, path=path, world_size=world_size, want=want)
        if verdict.outcome is not Outcome.OK:
            return verdict
    return OK


def _world_sizes(device: str) -> list[int]:
    if device == "cpu":
        return [2]
    return sorted({1, min(torch.cuda.device_count(), _NUM_GROUPS)})


def _compare(
    request: Request, notes: Notes, *, path: str, world_size: int, want: Mapping[str, Tensor]
) -> Verdict:
    scratch = Path(request.scratch)
    job = {"path": path, "scratch": str(scratch), "device": request.device, "world_size": world_size}
    file = scratch / "step.json"
    file.write_text(json.dumps(job))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    code = start_ranks([str(file)], world_size=world_size, module="launch.doctor.gpu.step")
    if code:
        return failed(
            f"{world_size} ranks ended with exit code {code}",
            "try fewer GPUs (CUDA_VISIBLE_DEVICES), NCCL_DEBUG=INFO, and NCCL_P2P_DISABLE=1",
        )
    errors = {}
    for dtype in LIMITS:
        got = load_file(scratch / f"gradient-{dtype}.safetensors")
        errors[dtype] = relative_error(got, want)
    found = json.loads((scratch / "ranks.json").read_text())
    notes.measured(
        **{f"error_of_{world_size}_ranks_{dtype}": error for dtype, error in errors.items()},
        **{f"{name}_of_{world_size}_ranks": value for name, value in found.items()},
    )
    return within(errors, LIMITS, remedy=_REMEDY)


def relative_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Norm of the difference as a share of the second one's norm; infinite if names differ."""
    if got.keys() != want.keys():
        return torch.inf
    difference = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    norm = sum(float(tensor.double().square().sum()) for tensor in want.values())
    return float((difference / norm) ** 0.5)


def step_of(config: Config, ranks: Ranks, *, is_small: bool) -> StepRunner:
    """The runner after a step over the same samples for every configuration."""
    policy = build_policy(config, config.model.path, ranks)
    runner = build_step_runner(config, policy, ranks)
    vocab_size = int(text_config(policy.model.config).vocab_size)
    groups = random_groups(_NUM_GROUPS, vocab_size=vocab_size, longest=24 if is_small else 128)
    runner.run(groups[ranks.rank :: ranks.world_size], step=0)
    return runner


def gradient_of(runner: StepRunner) -> dict[str, Tensor]:
    """The gradient of the last step, whole tensors on rank 0. Collective."""
    shards = shards_of(runner.policy)
    moments = [runner.optimizer.moments(MODEL_PREFIX + shard.name)["exp_avg"] for shard in shards]
    whole = gather([replace(shard, rows=rows) for shard, rows in zip(shards, moments, strict=True)])
    return {name: tensor.clone() for name, tensor in whole}


def settings_of(
    path: str, scratch: Path, *, device: str, world_size: int, dtype: str, is_small: bool
) -> Config:
    """A job whose gradient is Adam's first moment: beta 0, no clipping, no ratio of policies."""
    settings: dict[str, Any] = {
        "runs_dir": str(scratch),
        "name": "step",
        "model": {"path": path, "dtype": dtype},
        "objective": {"name": "reinforce"},
        "trainer": {
            "device": device,
            "world_size": world_size,
            "groups_per_step": _NUM_GROUPS,
            "tokens_per_microbatch": 256 if is_small else 1024,
            "betas": [0.0, 0.9],
            "max_grad_norm": 0.0,
        },
    }
    return resolved(from_mapping(settings))


def main(argv: list[str]) -> int:
    """One rank: runs the step in both dtypes; rank 0 writes the gradients and the rate of an all-reduce."""
    job = json.loads(Path(argv[0]).read_text())
    scratch, is_small = Path(job["scratch"]), job["device"] == "cpu"
    configs = {
        dtype: settings_of(
            job["path"],
            scratch,
            device=job["device"],
            world_size=job["world_size"],
            dtype=dtype,
            is_small=is_small,
        )
        for dtype in LIMITS
    }
    device = device_of(configs["float32"])
    with joined_ranks(configs["float32"], device) as ranks:
        for dtype, config in configs.items():
            runner = step_of(config, ranks, is_small=is_small)
            gradient = gradient_of(runner)
            if ranks.rank == 0:
                save_file(gradient, scratch / f"gradient-{dtype}.safetensors")
        _check_snapshot(runner.policy, ranks)
        found = {"all_reduce_gb_per_s": _all_reduce_rate(ranks)} if ranks.world_size > 1 else {}
        if ranks.rank == 0:
            (scratch / "ranks.json").write_text(json.dumps(found))
        ranks.meet()
    return 0


def _check_snapshot(policy: Policy, ranks: Ranks) -> None:
    """Raises AssertionError if the buckets of a push, gathered from all ranks, differ from the weights."""
    bucket_bytes = _BUCKET_BYTES[ranks.device.type]
    snapshotter = BoundaryGather(policy, ranks, bucket_bytes=bucket_bytes, dtype="bfloat16")
    snapshot = snapshotter.take_snapshot()
    weights = dict(gather(shards_of(policy)))
    if snapshot is not None:
        assert snapshot.acquire() and len(snapshot.buckets) > 1
        for index, bucket in enumerate(snapshot.buckets):
            gathered = snapshot.read(index)
            assert gathered.checksum == checksum(gathered.data), f"bucket {index} has changed on its way"
            for name, tensor in unflatten(bucket, gathered.data).items():
                assert torch.equal(tensor, weights[name].to(torch.bfloat16)), f"{name} is pushed wrongly"
    snapshotter.close()


def _all_reduce_rate(ranks: Ranks) -> float:
    """GB/s of an all-reduce: size of the tensor over time. Raises AssertionError if the sum is wrong."""
    tensor = torch.full((_REDUCED_NUMBERS[ranks.device.type],), float(ranks.rank + 1), device=ranks.device)
    dist.all_reduce(tensor)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    assert bool((tensor == expected).all()), "an all-reduce has returned a wrong sum"
    clock = clock_of(ranks.device)
    start = clock.mark()
    dist.all_reduce(tensor)
    (seconds,) = clock.seconds([(start, clock.mark())])
    return round(tensor.numel() * tensor.itemsize / max(seconds, 1e-9) / 1e9, 2)


if __name__ == "__main__":
    exit_at_once(main(sys.argv[1:]))
