"""Reinforcement learning against a reward model alone: does the task's own reward rise?

    python -m benchmarks.reward_model_rl [--seeds 0 1 2] [--steps 200]

A reward model is trained on pairs that the sorting task has labelled (`benchmarks.reward_model`). The default
job's initial model is then trained with `task.reward: model`, by one score server of the job; the task's own
reward, the gold reward, is recorded beside it and not trained on. The measure is the gold reward of greedy
answers to held-out prompts, before and after. The result is benchmarks/results/reward_model_rl.json; nothing
is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from areal_like.paths import RunPaths, find_checkpoints
from benchmarks import reward_model
from benchmarks.preferences import greedy_reward
from benchmarks.report import table, write
from launch.run_files import read_rows
from rollout_server.tasks.sort import SortTask

NUM_TRAIN, NUM_HELD_OUT = 20_000, 200
RM_STEPS, NUM_AVERAGED = 150, 20
"""Steps of the reward model's training; steps of RL whose mean is the first and the last reward."""


def measured(seed: int, *, num_steps: int, folder: Path) -> dict[str, Any]:
    """Trains a reward model, and a policy against it; returns the rewards."""
    trained = reward_model.measured(seed, num_steps=RM_STEPS, folder=folder)
    task = SortTask(seed=seed)
    for split, num in (("train", NUM_TRAIN), ("eval", NUM_HELD_OUT)):
        examples = [task.example(split, index) for index in range(num)]  # type: ignore[arg-type]
        rows = [json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n" for one in examples]
        (folder / f"prompts.{split}.jsonl").write_text("".join(rows))
    scorer = find_checkpoints(RunPaths(folder / "runs" / "rm").checkpoints)
    settings = [
        f"model.path={folder}/model",
        f"runs_dir={folder}/runs",
        f"seed={seed}",
        f"task={{name: data, train: {folder}/prompts.train.jsonl, eval: {folder}/prompts.eval.jsonl}}",
        "task.reward={name: model, transform: sigmoid}",
        "task.gold_reward=exact",
        f"scorer.path={scorer[max(scorer)]}",
        "rollout.reward_concurrency=64",
        f"sampling.max_new_tokens={reward_model.MAX_NEW_TOKENS}",
        f"trainer.num_steps={num_steps}",
        "eval.num_prompts=0",
    ]
    subprocess.run([sys.executable, "-m", "launch", "run", "name=rl", *settings], check=True)
    steps = [row for row in read_rows(folder / "runs" / "rl" / "metrics.jsonl") if row]
    checkpoints = find_checkpoints(RunPaths(folder / "runs" / "rl").checkpoints)

    def mean(name: str, some: list[dict[str, Any]]) -> float:
        return statistics.fmean(row[name] for row in some)

    return {
        "seed": seed,
        "num_steps": len(steps),
        "reward_model_accuracy": trained["accuracy_after"],
        "proxy_first": mean("reward_mean", steps[:NUM_AVERAGED]),
        "proxy_last": mean("reward_mean", steps[-NUM_AVERAGED:]),
        "gold_first": mean("reward_gold_mean", steps[:NUM_AVERAGED]),
        "gold_last": mean("reward_gold_mean", steps[-NUM_AVERAGED:]),
        "greedy_gold_before": greedy_reward(f"{folder}/model", seed=seed),
        "greedy_gold_after": greedy_reward(str(checkpoints[max(checkpoints)]), seed=seed),
    }


def main() -> None:
    """Runs all seeds, writes the result and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(seed, num_steps=args.steps, folder=Path(folder)))
    path = write("reward_model_rl", {"rows": rows})
    print(
        table(list(rows[0]), [[f"{v:.3f}" if isinstance(v, float) else v for v in r.values()] for r in rows])
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
