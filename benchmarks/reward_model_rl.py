"""Reinforcement learning against a reward model alone: does the task's own reward rise?

    python -m benchmarks.reward_model_rl [--seeds 0 1 2] [--steps 300] [--recipes alone kl ...]

A reward model is trained on pairs that the sorting task has labelled: answers of the default job's initial
model (`benchmarks.reward_model`), or these and wrong answers made on purpose (`broad`). The initial model is
then trained with `task.reward: model`, by one score server of the job, without (`alone`, `broad`) or with a
penalty on the KL divergence from it (`kl`, `broad_kl`). The task's own reward, the gold reward, is recorded
beside it: it is not trained on and selects nothing. The measure is the gold reward of answers to held-out
prompts, greedy and at temperature 1, before and after. The result is benchmarks/results/reward_model_rl.json;
nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from areal_like.paths import RunPaths, find_checkpoints
from benchmarks import reward_model
from benchmarks.preferences import held_out_reward
from benchmarks.report import table, write
from launch.run_files import read_rows
from rollout_server.tasks.sort import SortTask

NUM_TRAIN, NUM_HELD_OUT = 20_000, 200
NUM_AVERAGED = 20
"""Steps of RL whose mean is the first and the last reward."""
KL = ("kl={coef: 1.0, budget: 0.1}",)


class Pairs(NamedTuple):
    """The pairs and the training of a reward model."""

    num_made: int
    """Number of made pairs, beside those of the initial model's answers."""
    num_steps: int


PAIRS = {"sampled": Pairs(0, 150), "broad": Pairs(12_000, 400)}
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "alone": ("sampled", ()),
    "kl": ("sampled", KL),
    "broad": ("broad", ()),
    "broad_kl": ("broad", KL),
}
"""Recipe -> (the reward model's pairs, settings of RL)."""


def prepared(seed: int, names: Iterable[str], *, folder: Path) -> dict[str, float]:
    """Trains reward models and writes the prompts of RL; returns each model's accuracy on held-out pairs of
    the initial model's answers."""
    accuracies = {}
    for name in names:
        num_made, num_steps = PAIRS[name]
        result = reward_model.measured(
            seed, num_steps=num_steps, folder=folder, name=f"rm-{name}", num_made=num_made
        )
        accuracies[name] = float(result["accuracy_after"])
    task = SortTask(seed=seed)
    for split, num in (("train", NUM_TRAIN), ("eval", NUM_HELD_OUT)):
        examples = [task.example(split, index) for index in range(num)]  # type: ignore[arg-type]
        rows = [json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n" for one in examples]
        (folder / f"prompts.{split}.jsonl").write_text("".join(rows))
    return accuracies


def measured(seed: int, recipe: str, *, num_steps: int, folder: Path) -> dict[str, Any]:
    """Trains a policy against a reward model that `prepared` has left in `folder`; returns the rewards."""
    name, extra = RECIPES[recipe]
    scorer = find_checkpoints(RunPaths(folder / "runs" / f"rm-{name}").checkpoints)
    run = folder / "runs" / recipe
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
        *extra,
    ]
    subprocess.run([sys.executable, "-m", "launch", "run", f"name={recipe}", *settings], check=True)
    steps = [row for row in read_rows(run / "metrics.jsonl") if row]
    checkpoints = find_checkpoints(RunPaths(run).checkpoints)
    models = {"before": f"{folder}/model", "after": str(checkpoints[max(checkpoints)])}

    def mean(name: str, some: list[dict[str, Any]]) -> float:
        return statistics.fmean(row[name] for row in some)

    return {
        "seed": seed,
        "recipe": recipe,
        "num_steps": len(steps),
        "proxy_first": mean("reward_mean", steps[:NUM_AVERAGED]),
        "proxy_last": mean("reward_mean", steps[-NUM_AVERAGED:]),
        "gold_first": mean("reward_gold_mean", steps[:NUM_AVERAGED]),
        "gold_last": mean("reward_gold_mean", steps[-NUM_AVERAGED:]),
        "kl_last": mean("kl_ref", steps[-NUM_AVERAGED:]) if "kl_ref" in steps[-1] else None,
        **{
            f"{how}_gold_{when}": held_out_reward(model, seed=seed, do_sample=how == "sampled")
            for how in ("greedy", "sampled")
            for when, model in models.items()
        },
    }


def main() -> None:
    """Runs all seeds and recipes, writes the results and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            names = dict.fromkeys(RECIPES[recipe][0] for recipe in args.recipes)
            accuracies = prepared(seed, names, folder=Path(folder))
            for recipe in args.recipes:
                row = measured(seed, recipe, num_steps=args.steps, folder=Path(folder))
                rows.append(row | {"reward_model_accuracy": accuracies[RECIPES[recipe][0]]})
    path = write("reward_model_rl", {"rows": rows})
    print(
        table(list(rows[0]), [[f"{v:.3f}" if isinstance(v, float) else v for v in r.values()] for r in rows])
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
