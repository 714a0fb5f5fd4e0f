"""Runs the default job with and without keys in turn: steps per minute of each, and their ratio.

    python -m benchmarks.keyed_job [--rounds 3] [key=value ...]

Both sides have the same seed and settings and run one after the other on the same machine; every other round
starts with the other side. Writes benchmarks/results/keyed_job.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from areal_like.security.administration import init_keys
from areal_like.security.keys import KeyRole
from benchmarks.report import run_job, table, write


def main() -> None:
    """Runs all rounds and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    steps_per_minute: dict[str, list[float]] = {"without keys": [], "with keys": []}
    with tempfile.TemporaryDirectory() as scratch:
        keys = Path(scratch) / "keys"
        init_keys(keys, list(KeyRole))
        for number in range(args.rounds):
            sides = list(steps_per_minute)
            for side in reversed(sides) if number % 2 else sides:
                settings = [f"security.keys={keys}"] if side == "with keys" else []
                summary, _ = run_job(
                    f"{side.replace(' ', '-')}-{number}",
                    [*args.overrides, *settings],
                    runs_dir=Path(scratch),
                    timeout_s=900,
                )
                rate = 60 * summary["steps"] / summary["training_seconds"]
                steps_per_minute[side].append(round(rate, 2))
                print(f"{side}: {rate:.1f} steps per minute", flush=True)
    medians = {side: statistics.median(rates) for side, rates in steps_per_minute.items()}
    ratio = round(medians["with keys"] / medians["without keys"], 3)
    write(
        "keyed_job",
        {"overrides": args.overrides, "steps_per_minute": steps_per_minute, "median_ratio": ratio},
    )
    rows = [
        [side, *(f"{rate:.0f}" for rate in rates), f"{medians[side]:.0f}"]
        for side, rates in steps_per_minute.items()
    ]
    print(table(["steps per minute", *(f"round {i + 1}" for i in range(args.rounds)), "median"], rows))
    print(f"\nwith keys: {ratio} of the rate without")


if __name__ == "__main__":
    main()
