"""Measures the overhead of VCPO's baseline: ghost, exact and proxy norms against plain sequence TIS.

The load has the default job's shape: its model, 16 groups of 8, sequences of about 16 tokens, different
rewards in every group, one thread. Time is the thread's CPU time (nothing waits). The ratio is the median of
the ratios to the plain step of the same repetition, so that other load on the machine changes it little.
Exact norms take ten times as long and are timed after the others. Memory is the growth of the process's peak
resident size since before the first step, with each objective in a separate process.

`goal`: a step with ghost norms takes at most 1.25 times as long as a step of plain TIS.

    python -m benchmarks.vcpo_overhead [--repeats 30] [--groups 16] [--width 96]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from areal_like.config import Config
from areal_like.trajectory import FinishReason, Trajectory
from benchmarks.report import table, write
from trainer.advantages.group import Grpo
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.objectives import OBJECTIVES
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.runner import StepRunner

GOAL = 1.25
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {
    "tis": {"name": "tis", "level": "sequence", "cap": 8.0},
    "vcpo, no baseline": {"name": "vcpo", "baseline": "none"},
    "vcpo, proxy": {"name": "vcpo", "norms": "proxy"},
    "vcpo, ghost": {"name": "vcpo", "norms": "ghost"},
    "vcpo, exact": {"name": "vcpo", "norms": "exact"},
}


def model_at(path: str, *, width: int) -> str:
    """The default job's architecture, untrained; `width` is its hidden size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=width, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=width * 8 // 3, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def groups_of(num_groups: int, *, group_size: int = 8) -> list[list[Trajectory]]:
    """Prompts of 6 to 10 tokens, completions of 5 to 10, alternating rewards."""
    rng = np.random.default_rng(0)
    return [
        [trajectory(rng, num_prompt=int(prompt), reward=i % 2) for i in range(group_size)]
        for prompt in rng.integers(6, 11, num_groups)
    ]


def trajectory(rng: np.random.Generator, *, num_prompt: int, reward: float) -> Trajectory:
    """A sample of random tokens, with log-probs close to those of a uniform policy."""
    num_sampled = int(rng.integers(5, 11))
    mask = np.repeat([0, 1], [num_prompt, num_sampled]).astype(np.uint8)
    return Trajectory(
        tokens=rng.integers(3, 100, len(mask)).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -4.6 + 0.1 * rng.standard_normal(len(mask)), 0).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=float(reward),
        finish_reason=FinishReason.STOP,
    )


def runner_of(path: str, settings: dict[str, Any]) -> StepRunner:
    """The default job's step, with learning rate 0 so that every repetition does the same work."""
    ranks = Ranks.alone()
    policy = Policy.load(path, ranks)
    return StepRunner(
        policy,
        ShardedAdamW(policy, ranks, lr=0.0),
        ranks,
        objective=OBJECTIVES.build(settings),
        advantage=Grpo(),
        normalizer=Normalizer(name="seq_mean_token_mean", max_tokens=10),
        budget_tokens=Config().trainer.tokens_per_microbatch,
    )


def peak_mib(name: str, path: str, num_groups: int) -> float:
    """Growth of the peak resident size over three steps. Call it in a new process."""
    torch.set_num_threads(1)
    runner, groups = runner_of(path, OBJECTIVE_SETTINGS[name]), groups_of(num_groups)
    before = int(
        next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")
        ).split()[1]
    )
    for step in range(3):
        runner.run(groups, step=step)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def step_seconds(
    path: str, num_groups: int, names: Sequence[str], *, repeats: int
) -> dict[str, dict[str, float]]:
    """Median CPU seconds of a step, and median ratio to the first objective's step in the same repetition."""
    torch.set_num_threads(1)
    groups = groups_of(num_groups)
    runners = {name: runner_of(path, OBJECTIVE_SETTINGS[name]) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 2):
        for name, runner in runners.items():
            started = time.thread_time()
            runner.run(groups, step=0)
            if repeat >= 2:
                seconds[name].append(time.thread_time() - started)
    plain = seconds[names[0]]
    return {
        name: {
            "step_s": statistics.median(values),
            "ratio": statistics.median(value / base for value, base in zip(values, plain, strict=True)),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    """Measures, prints a table, writes benchmarks/results/vcpo_overhead.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--width", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = model_at(scratch, width=arguments.width)
        memory = {}
        for name in OBJECTIVE_SETTINGS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                memory[name] = pool.submit(peak_mib, name, path, arguments.groups).result()
        fast = [name for name in OBJECTIVE_SETTINGS if name != "vcpo, exact"]
        rows = step_seconds(path, arguments.groups, fast, repeats=arguments.repeats)
        slow = step_seconds(
            path, arguments.groups, ["tis", "vcpo, exact"], repeats=max(3, arguments.repeats // 6)
        )
        rows["vcpo, exact"] = slow["vcpo, exact"]
    for name, row in rows.items():
        row["peak_mib"] = memory[name]
    suffix = "" if arguments.width == 96 else f"_{arguments.width}"
    settings = {
        "goal": GOAL,
        "groups": arguments.groups,
        "group_size": 8,
        "width": arguments.width,
        "repeats": arguments.repeats,
    }
    write(f"vcpo_overhead{suffix}", {**settings, "objectives": rows})
    print(
        table(
            ["objective", "step, ms", "of plain TIS", "peak memory over rest, MiB"],
            [
                [name, f"{1e3 * row['step_s']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_mib']:.0f}"]
                for name, row in rows.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
