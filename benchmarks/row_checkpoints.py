"""Trains a real model on several ranks up to a checkpoint and on other ranks after it, compared with one
rank.

One rank trains all steps. Then several ranks train the first half from rows of the initial weights, write a
checkpoint, and fewer ranks resume from it and train the rest. Both train on the same synthetic groups, so the
losses differ only by the order of sums. Every rank is a process. Reported for each phase are the growth of a
rank's resident memory at its peak (the largest of the ranks) while it loads, trains, saves for the first and
for the second time, and the seconds of the slowest rank. After loading, a rank holds its rows of the weights
(4 bytes for each parameter) and, when it resumes, also those of the moments (8); a save adds a copy of all
three (12).

`goal`: the losses agree to 1e-4.

    python -m benchmarks.row_checkpoints [--model smollm2] [--steps 20] [--ranks 4 2] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from areal_like.config import Config, ModelConfig
from areal_like.paths import BUILT_MODELS
from areal_like.trajectory import FinishReason, Trajectory
from benchmarks.report import ROOT, table, write
from tests.support.memory import peak, reset_peak
from trainer.advantages.group import Grpo
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.objectives import OBJECTIVES
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.prepare_model import prepare_model
from trainer.step.runner import StepRunner

GOAL = 1e-4
MIB = 1 << 20
NUM_GROUPS, GROUP_SIZE, NUM_TOKENS = 4, 2, 16


def groups_of(step: int, *, vocab_size: int) -> list[list[Trajectory]]:
    """The groups of one step: random tokens, half of them sampled, one sample of each group rewarded."""
    rng = np.random.default_rng(step)
    mask = np.repeat([0, 1], NUM_TOKENS // 2).astype(np.uint8)
    return [
        [
            Trajectory(
                tokens=rng.integers(3, vocab_size, NUM_TOKENS).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -10.0, 0.0).astype(np.float32),
                versions=np.where(mask, 0, -1).astype(np.int32),
                reward=float(sample % 2),
                finish_reason=FinishReason.STOP,
            )
            for sample in range(GROUP_SIZE)
        ]
        for _ in range(NUM_GROUPS)
    ]


def train(job: dict[str, Any], rank: int) -> None:
    """One rank of one phase; writes its measurements to stdout as JSON."""
    torch.set_num_threads(1)
    world_size = job["ranks"]
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(job["store"], world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )
    ranks = Ranks()
    found: dict[str, Any] = {"losses": [], "memory": {}, "seconds": {}}

    def measured(name: str, action: Callable[[], Any]) -> None:
        ranks.meet()
        before, started_s = reset_peak(), time.perf_counter()
        action()
        found["seconds"][name] = round(time.perf_counter() - started_s, 3)
        found["memory"][name] = peak() - before

    policy = Policy.build(job["model"], chunk_tokens=256).shard(ranks, dtype=job["dtype"])
    optimizer = ShardedAdamW(policy, ranks, lr=1e-5)
    checkpoints = Checkpoints(Path(job["root"]), keep=2, tokenizer_path=job["model"], dtype=job["dtype"])
    checkpoints.open(ranks)
    if job["resumes"]:
        measured("load", lambda: checkpoints.load(job["first"], policy, optimizer, ranks))
    else:
        measured("load", policy.read_initial_weights)
    runner = StepRunner(
        policy,
        optimizer,
        ranks,
        objective=OBJECTIVES.build({"name": "reinforce"}),
        advantage=Grpo(),
        normalizer=Normalizer(name="token_mean", max_tokens=NUM_TOKENS),
        budget_tokens=4096,
    )

    def steps() -> None:
        for step in range(job["first"], job["end"]):
            groups = groups_of(step, vocab_size=policy.model.config.vocab_size)
            found["losses"].append(runner.run(groups[rank::world_size], step=step)["loss"])

    def save() -> None:
        checkpoints.save(job["end"], policy, optimizer, ranks, extra={})
        checkpoints.wait()

    measured("train", steps)
    if job["saves"]:
        measured("first save", save)
        measured("second save", save)
    checkpoints.close()
    found["num_parameters"] = sum(param.numel() for param in policy.parameters())
    print(json.dumps(found), flush=True)
    ranks.meet()
    dist.destroy_process_group()


def run_phase(**job: Any) -> dict[str, Any]:
    """Runs one phase in separate processes; returns the largest of the ranks' measurements."""
    command = [sys.executable, "-m", "benchmarks.row_checkpoints", "--rank", json.dumps(job)]
    # Freed memory is returned to the system at once, so that memory that is already free does not hide a
    # peak.
    variables = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | variables
        )
        for rank in range(job["ranks"])
    ]
    try:
        outputs = [rank.communicate(timeout=1800)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank of {job['ranks']} failed")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(result["losses"] == results[0]["losses"] for result in results)
    worst = {
        kind: {name: max(result[kind][name] for result in results) for name in results[0][kind]}
        for kind in ("memory", "seconds")
    }
    return results[0] | worst | {"ranks": job["ranks"], "steps": [job["first"], job["end"]]}


def main() -> None:
    """Trains, compares the losses, writes the result, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a directory")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", nargs=2, type=int, default=[4, 2], help="before and after the checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(json.loads(options.rank[0]), int(options.rank[1]))
        return
    half, end = options.steps // 2, options.steps
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), options.model
        if model in BUILT_MODELS:
            model = prepare_model(Config(model=ModelConfig(path=model)), out_dir=folder / "model")
        common = {"model": str(model), "dtype": options.dtype}
        alone = run_phase(
            **common, ranks=1, first=0, end=end, saves=True, resumes=False,
            root=str(folder / "alone"), store=str(folder / "store-0"),
        )  # fmt: skip
        before = run_phase(
            **common, ranks=options.ranks[0], first=0, end=half, saves=True, resumes=False,
            root=str(folder / "rows"), store=str(folder / "store-1"),
        )  # fmt: skip
        after = run_phase(
            **common, ranks=options.ranks[1], first=half, end=end, saves=False, resumes=True,
            root=str(folder / "rows"), store=str(folder / "store-2"),
        )  # fmt: skip
    losses = before["losses"] + after["losses"]
    difference = max(abs(a - b) for a, b in zip(alone["losses"], losses, strict=True))
    phases = [alone, before, after]
    result = {
        "command": f"python -m benchmarks.row_checkpoints --model {options.model} --dtype {options.dtype}",
        "goal": GOAL,
        "largest_difference": difference,
        "phases": phases,
    }
    if not options.no_write:
        write("row_checkpoints", result)
    names = ("load", "train", "first save", "second save")
    rows = [
        (
            phase["ranks"],
            "{} to {}".format(*phase["steps"]),
            round(4 * phase["num_parameters"] / phase["ranks"] / MIB),
            *(round(phase["memory"][name] / MIB) if name in phase["memory"] else "" for name in names),
            *(phase["seconds"].get(name, "") for name in ("load", "first save", "second save")),
        )
        for phase in phases
    ]
    header = (
        "ranks",
        "steps",
        "weights MiB",
        *(f"{name} MiB" for name in names),
        "load s",
        "save s",
        "again s",
    )
    print(table(header, rows))
    print(f"losses {losses[0]:.6f} to {losses[-1]:.6f}; largest difference {difference:.2e}, goal {GOAL}")
    if not difference <= GOAL:
        sys.exit("the losses differ")


if __name__ == "__main__":
    main()
