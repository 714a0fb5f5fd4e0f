"""What asynchrony buys: the default job with `max_staleness` 0 and 4 in one run, beside the analytic bound.

    python -m benchmarks.async_vs_sync [--steps 300] [--target 0.7] [key=value ...]

A synchronous step costs g + t (generation, then training); perfectly overlapped it costs max(g, t), so the speed-up is at most
(g + t) / max(g, t). g and t are measured in the synchronous run: t is a step without its wait for data, g the wait (which holds
generation, the stream and the push). The synchronous run gets the better of one and two threads a process, because it leaves one core
idle while the other works. Writes benchmarks/results/async_vs_sync.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import run_job, table, write

WARM_UP_STEPS = 20
WINDOW = 15


def main() -> None:
    """Three jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    jobs = {"sync, 1 thread": (0, 1), "sync, 2 threads": (0, 2), "async": (4, 1)}
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (label, (max_staleness, num_threads)) in enumerate(jobs.items()):
            threads = [f"trainer.num_threads={num_threads}", f"rollout.num_threads={num_threads}"]
            overrides = [f"max_staleness={max_staleness}", f"trainer.num_steps={args.steps}", *threads, *args.overrides]
            summary, rows = run_job(f"job-{number}", overrides, runs_dir=Path(scratch), timeout_s=1800)
            measured[label] = measure(summary, rows, target=args.target)
            print(f"{label}: {measured[label]['steps_per_minute']:.0f} steps/min", flush=True)
    sync = max((measured["sync, 1 thread"], measured["sync, 2 threads"]), key=lambda job: job["steps_per_minute"])
    one = measured["sync, 1 thread"]
    bound = (one["generation_s"] + one["training_s"]) / max(one["generation_s"], one["training_s"])
    speedup = measured["async"]["steps_per_minute"] / sync["steps_per_minute"]
    result = {"jobs": measured, "bound": bound, "speedup": speedup, "share_of_bound": speedup / bound, "overrides": args.overrides}
    write("async_vs_sync", result)
    print(
        table(
            ["job", "steps/min", f"s to reward {args.target}", "g (s)", "t (s)", "generation idle", "trainer idle", "mean lag"],
            [
                [
                    label,
                    f"{job['steps_per_minute']:.0f}",
                    "-" if job["seconds_to_target"] is None else f"{job['seconds_to_target']:.0f}",
                    f"{job['generation_s']:.3f}",
                    f"{job['training_s']:.3f}",
                    job["generation_idle_fraction"],
                    job["trainer_idle_fraction"],
                    f"{job['mean_trained_lag']:.2f}",
                ]
                for label, job in measured.items()
            ],
        )
    )
    print(f"\nspeed-up {speedup:.2f} over the faster synchronous run; bound (g+t)/max(g,t) = {bound:.2f}; share {speedup / bound:.2f}")


def measure(summary: dict[str, Any], rows: list[dict[str, Any]], *, target: float) -> dict[str, Any]:
    """Rates after warm-up, from the rows' own clock."""
    steady = rows[WARM_UP_STEPS:]
    wall_s = steady[-1]["time_unix_s"] - rows[WARM_UP_STEPS - 1]["time_unix_s"]
    step_s = wall_s / len(steady)
    wait_s = statistics.mean(row["wait_data_s"] for row in steady)
    return {
        "steps_per_minute": 60 / step_s,
        "seconds_to_target": seconds_to(rows, target),
        "generation_s": wait_s,
        "training_s": step_s - wait_s,
        **{
            key: summary[key]
            for key in ("generation_idle_fraction", "trainer_idle_fraction", "mean_trained_lag", "eval_before", "eval_after")
        },
    }


def seconds_to(rows: list[dict[str, Any]], target: float) -> float | None:
    """Seconds until the moving average of the reward reaches the target."""
    for at in range(WINDOW, len(rows) + 1):
        if statistics.mean(row["reward_mean"] for row in rows[at - WINDOW : at]) >= target:
            return float(rows[at - 1]["time_unix_s"] - rows[0]["time_unix_s"])
    return None


if __name__ == "__main__":
    main()
