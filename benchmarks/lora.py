"""Trains the default job in full and with LoRA: held-out scores, steps, and the bytes of a push.

    python -m benchmarks.lora [--seeds 0 1 2] [--arms full lora ...] [--report]
    python -m benchmarks.lora --arms rate-4e-4 rate-1.6e-3 lora-adapter --seeds 0    # rates, adapter pushes

The adapters have rank 8 and are on all linear layers (`ARMS`); everything else is the default job's. A run is
added to benchmarks/results/lora.json when it ends and is not repeated, so the benchmark may be stopped and
started again. The score is the greedy score on held-out prompts; run times are not compared here, so other
work on the machine does no harm.

The bytes of a push follow from the shapes of its tensors, which the trainer's own code lists, for the default
job's model and for SmolLM2-135M. Merged pushes have the bytes of those of a full training.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from areal_like.config import LoraConfig
from areal_like.config.default_objective import as_setting
from areal_like.runtime.command_line import load_config
from areal_like.weights.hf_layout import adapter_tensors, hf_tensors
from benchmarks.report import RESULTS, run_job, table, write
from trainer.models.packed_model import DTYPES
from trainer.models.policy import Policy
from trainer.planning.shapes import SHAPES

RANK, ALPHA, RATE = 8, 32, "8e-4"
"""Of the arm `lora`. The rate is ten times the default job's."""


def adapter(rate: str) -> tuple[str, ...]:
    """The settings of a job with LoRA on all linear layers."""
    return (f"model.lora.rank={RANK}", f"model.lora.alpha={ALPHA}", f"trainer.lr={rate}")


ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": adapter(RATE),
    "lora-adapter": (*adapter(RATE), "weights.lora=adapter"),
    **{f"rate-{rate}": adapter(rate) for rate in ("8e-5", "4e-4", "1.6e-3", "3.2e-3")},
}
"""Name -> settings that differ from the default job's."""
MAIN_ARMS = ("full", "lora")
NEAR = 0.05
"""A score this much below that of the full training with the same seed, or better, counts as reached."""
KEPT = (
    *("steps", "eval_before", "eval_after", "reward_first", "reward_last", "training_seconds"),
    *("max_trained_lag", "mean_trained_lag", "drops"),
)
MODELS = {"default job": "tiny", "SmolLM2-135M": "smollm2"}
"""Name -> directory below configs/scale/models."""


def main() -> None:
    """Runs the missing jobs, then prints the tables of all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(MAIN_ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", default="lora", help="name of the file in benchmarks/results")
    parser.add_argument("--objective", default="auto", help="as on a job's command line")
    args = parser.parse_args()
    objective = resolved(args.objective)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in [] if args.report else args.seeds:
            for arm in args.arms:
                if not any(is_of(run, arm, seed, objective) for run in read(args.results)):
                    done = run_arm(arm, seed, objective, scratch=Path(scratch))
                    # Read again: another process may run other arms.
                    write(args.results, {"runs": [*read(args.results), done], "push_bytes": push_bytes()})
    runs = read(args.results)
    print(objective, scores(runs, objective), pushes(push_bytes()), sep="\n\n")


def read(name: str) -> list[dict[str, Any]]:
    """The finished runs in a results file."""
    path = RESULTS / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    return runs


def is_of(run: dict[str, Any], arm: str, seed: int, objective: str) -> bool:
    """True for a run of this arm, with the settings that the arm has now."""
    found = (run["arm"], run["seed"], run["settings"], run["objective"])
    return bool(found == (arm, seed, list(ARMS[arm]), objective))


def resolved(objective: str) -> str:
    """The objective that a job with this setting has, as one types it."""
    return as_setting(load_config([f"objective={objective}"]).with_resolved_objective().objective)


def run_arm(arm: str, seed: int, objective: str, *, scratch: Path) -> dict[str, Any]:
    """Runs one job."""
    summary, rows = run_job(
        f"{arm}-{seed}",
        [f"seed={seed}", f"objective={objective}", *ARMS[arm]],
        runs_dir=scratch,
        timeout_s=2 * 3600,
    )
    evals = [(row["step"], row["eval_reward"]) for row in rows if "eval_reward" in row]
    print(
        f"{time.strftime('%H:%M:%S')} {arm} seed {seed}: "
        f"{summary['eval_before']:.3f} -> {summary['eval_after']:.3f}",
        flush=True,
    )
    kept = {key: summary[key] for key in KEPT}
    key = {"arm": arm, "seed": seed, "settings": list(ARMS[arm]), "objective": objective}
    return {**key, **kept, "evals": evals}


def push_bytes() -> dict[str, dict[str, int]]:
    """Model and dtype -> bytes of a push of a full training, of merged weights, and of an adapter."""
    found = {}
    for name, folder in MODELS.items():
        path = str(SHAPES / folder)
        whole = hf_tensors(Policy.build(path).model)
        model = Policy.build(path, lora_settings=LoraConfig(rank=RANK)).model
        for dtype in ("float32", "bfloat16"):
            found[f"{name}, {dtype}"] = {
                kind: sum(math.prod(tensor.shape) for tensor in tensors) * DTYPES[dtype].itemsize
                for kind, tensors in (
                    ("full", whole),
                    ("merged", hf_tensors(model)),
                    ("adapter", adapter_tensors(model)),
                )
            }
    return found


def reached_at(run: dict[str, Any], target: float) -> int | None:
    """The first evaluated step with at least this score; None: never."""
    scores = [*run["evals"], (run["steps"], run["eval_after"])]
    return next((step for step, score in scores if score >= target), None)


def scores(runs: list[dict[str, Any]], objective: str) -> str:
    """A table with one line per arm; a cell has the values of all seeds, in order."""
    now = [run for run in runs if run["arm"] in ARMS and is_of(run, run["arm"], run["seed"], objective)]
    full = {run["seed"]: run["eval_after"] for run in now if run["arm"] == "full"}
    lines = []
    for arm in ARMS:
        own = sorted((run for run in now if run["arm"] == arm), key=lambda run: int(run["seed"]))
        if not own:
            continue
        compared = [run for run in own if run["seed"] in full]
        reached = [reached_at(run, full[run["seed"]] - NEAR) for run in compared]
        lines.append(
            [
                arm,
                " ".join(ARMS[arm]) or "–",
                own[0]["steps"],
                " ".join(str(run["seed"]) for run in own),
                " ".join(f"{run['eval_before']:.2f}" for run in own),
                " ".join(f"{run['eval_after']:.3f}" for run in own),
                " ".join(f"{run['eval_after'] - full[run['seed']]:+.3f}" for run in compared),
                " ".join("never" if step is None else str(step) for step in reached),
                " ".join(f"{run['reward_last']:.2f}" for run in own),
            ]
        )
    header = ["arm", "settings", "steps", "seeds", "held-out before", "after", "less full"]
    return table([*header, f"within {NEAR:g} of full at step", "samples at the end"], lines)


def pushes(sizes: dict[str, dict[str, int]]) -> str:
    """A table of the bytes of a push."""
    return table(
        ["model", "full", "merged", f"adapter of rank {RANK}", "adapter / full"],
        [
            [
                name,
                f"{kinds['full']:,}",
                f"{kinds['merged']:,}",
                f"{kinds['adapter']:,}",
                f"{100 * kinds['adapter'] / kinds['full']:.2f} %",
            ]
            for name, kinds in sizes.items()
        ],
    )


if __name__ == "__main__":
    main()
