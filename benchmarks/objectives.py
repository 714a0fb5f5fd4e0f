"""Runs the default job with every objective and compares the held-out scores.

    python -m benchmarks.objectives [--only tis vcpo ...] [--report] [key=value ...]

The four main objectives run with three seeds, every other preset of configs/objective with one seed. All
other settings are the default job's, except for LEARNING_RATES. Each run is appended to
benchmarks/results/objectives.jsonl when it ends and is not repeated, so the benchmark may be stopped and
started again. The score is the greedy score on held-out prompts; run times are not compared here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, run_job, table

MAIN_OBJECTIVES = ("tis", "vcpo", "vespo", "oapl")
"""Objectives that are run with three seeds."""

LEARNING_RATES = {"oapl": 1e-4}
"""Objective -> `trainer.lr`, where it differs from the default job's."""

KEPT = (
    *("steps", "eval_before", "eval_after", "reward_first", "reward_last", "training_seconds"),
    *("max_trained_lag", "mean_trained_lag", "tickets", "drops"),
)


def presets() -> list[str]:
    """Every objective with a preset, the main ones first."""
    names = sorted(
        path.stem
        for path in (ROOT / "configs" / "objective").glob("*.yaml")
        if path.stem not in ("custom", "distill")
    )
    return [*MAIN_OBJECTIVES, *(name for name in names if name not in MAIN_OBJECTIVES)]


def seeds_of(objective: str) -> range:
    """The seeds of an objective's runs."""
    return range(3 if objective in MAIN_OBJECTIVES else 1)


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Runs the missing jobs, then prints a table of all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=presets(), metavar="OBJECTIVE")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives.jsonl")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if not args.report:
        done = {(run["objective"], run["seed"], tuple(run["overrides"])) for run in read(args.results)}
        with tempfile.TemporaryDirectory() as scratch:
            for objective in args.only:
                own = [f"trainer.lr={LEARNING_RATES[objective]}"] if objective in LEARNING_RATES else []
                overrides = [*own, *args.overrides]
                for seed in seeds_of(objective):
                    if (objective, seed, tuple(overrides)) not in done:
                        run(objective, seed, overrides, scratch=Path(scratch), results=args.results)
    print(as_table(read(args.results)))


def run(objective: str, seed: int, overrides: list[str], *, scratch: Path, results: Path) -> None:
    """Runs one job and appends its line to the results."""
    settings = [f"objective={objective}", f"seed={seed}", *overrides]
    summary, _ = run_job(f"{objective}-{seed}", settings, runs_dir=scratch, timeout_s=1800)
    kept = {key: summary[key] for key in KEPT}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps({"objective": objective, "seed": seed, "overrides": overrides, **kept}) + "\n")
    scores = f"{summary['eval_before']:.2f} -> {summary['eval_after']:.2f}"
    print(
        f"{time.strftime('%H:%M:%S')} {objective} seed {seed}: {scores} "
        f"in {summary['training_seconds']:.0f} s",
        flush=True,
    )


def as_table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table with one line per objective, with the scores of all its seeds."""
    rows = []
    for objective in presets():
        own = sorted((run for run in runs if run["objective"] == objective), key=lambda run: int(run["seed"]))
        if own:
            after = " ".join(f"{run['eval_after']:.2f}" for run in own)
            sampled = " ".join(f"{run['reward_last']:.2f}" for run in own)
            mean_lag = sum(run["mean_trained_lag"] for run in own) / len(own)
            lag = f"{max(run['max_trained_lag'] for run in own)} / {mean_lag:.1f}"
            stale = sum(run["drops"]["stale"] for run in own)
            overrides = " ".join(own[0]["overrides"]) or "–"
            rows.append([f"`{objective}`", after, sampled, lag, stale, overrides])
    return table(
        [
            "objective",
            "held-out greedy after",
            "samples at the end",
            "lag max / mean",
            "stale drops",
            "changed settings",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
