"""Measures the speed-up of asynchronous training: a job with `max_staleness` 0 and 4.

    python -m benchmarks.async_vs_sync [--config FILE] [--steps 300] [--target 0.7] [key=value ...]

The job is the default one, or that of `--config` (configs/jobs/tools.yaml).

The speed-up is compared with two analytic bounds. A synchronous step takes g + t (generation, then training)
plus the latency between them (push, lease, stream). With perfect overlap it takes max(g, t). All three times
are measured in the synchronous run with one thread: t is the step without its wait for data, g is the time in
which the engine had something to decode, and latency is the rest of the wait. The bounds are:

    (g + t) / max(g, t)                      can be exceeded, because asynchrony hides latency too
    (g + latency + t) / max(g + latency, t)  treats latency as work that cannot be hidden inside generation

The speed-up is over the faster of two synchronous runs, with one and with two threads per process, because a
synchronous run leaves one core idle while the other works. Writes benchmarks/results/async_vs_sync.json, or
async_vs_sync_<name of the file>.json.
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
    """Runs three jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="a whole job; default: the default job")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    jobs = {"sync, 1 thread": (0, 1), "sync, 2 threads": (0, 2), "async": (4, 1)}
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (label, (max_staleness, num_threads)) in enumerate(jobs.items()):
            threads = [f"trainer.num_threads={num_threads}", f"rollout.num_threads={num_threads}"]
            overrides = [
                *(["--config", str(args.config.resolve())] if args.config else []),
                f"max_staleness={max_staleness}",
                f"trainer.num_steps={args.steps}",
                *threads,
                *args.overrides,
            ]
            summary, rows = run_job(f"job-{number}", overrides, runs_dir=Path(scratch), timeout_s=1800)
            measured[label] = measure(summary, rows, target=args.target)
            print(f"{label}: {measured[label]['steps_per_minute']:.0f} steps/min", flush=True)
    result = compare(measured)
    name = f"async_vs_sync_{args.config.stem}" if args.config else "async_vs_sync"
    write(name, {"jobs": measured, **result, "overrides": args.overrides})
    print(
        table(
            [
                "job",
                "steps/min",
                f"s to reward {args.target}",
                "g (s)",
                "latency (s)",
                "t (s)",
                "generation idle",
                "trainer idle",
                "mean lag",
            ],
            [
                [
                    label,
                    f"{job['steps_per_minute']:.0f}",
                    "-" if job["seconds_to_target"] is None else f"{job['seconds_to_target']:.0f}",
                    f"{job['generation_s']:.3f}",
                    f"{job['latency_s']:.3f}",
                    f"{job['training_s']:.3f}",
                    job["generation_idle_fraction"],
                    job["trainer_idle_fraction"],
                    f"{job['mean_trained_lag']:.2f}",
                ]
                for label, job in measured.items()
            ],
        )
    )
    print(
        f"\nspeed-up {result['speedup']:.2f} over the faster synchronous run; "
        f"bound (g+t)/max(g,t) = {result['bound']:.2f}, share {result['speedup'] / result['bound']:.2f}; "
        f"with latency as work: bound {result['bound_with_latency']:.2f}, "
        f"share {result['speedup'] / result['bound_with_latency']:.2f}"
    )


def compare(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Speed-up of the asynchronous job over the faster synchronous one, and the two bounds."""
    one = measured["sync, 1 thread"]
    g, latency, t = one["generation_s"], one["latency_s"], one["training_s"]
    fastest = max(measured[name]["steps_per_minute"] for name in ("sync, 1 thread", "sync, 2 threads"))
    return {
        "speedup": measured["async"]["steps_per_minute"] / fastest,
        "bound": (g + t) / max(g, t),
        "bound_with_latency": (g + latency + t) / max(g + latency, t),
    }


def measure(summary: dict[str, Any], rows: list[dict[str, Any]], *, target: float) -> dict[str, Any]:
    """Rates after warm-up, from the times in the metrics rows."""
    steady = rows[WARM_UP_STEPS:]
    wall_s = steady[-1]["time_unix_s"] - rows[WARM_UP_STEPS - 1]["time_unix_s"]
    step_s = wall_s / len(steady)
    wait_s = statistics.mean(row["wait_data_s"] for row in steady)
    busy_s = (1 - summary["generation_idle_fraction"]) * step_s
    return {
        "steps_per_minute": 60 / step_s,
        "seconds_to_target": seconds_to(rows, target),
        "generation_s": busy_s,
        "latency_s": max(0.0, wait_s - busy_s),
        "training_s": step_s - wait_s,
        **{
            key: summary[key]
            for key in (
                "generation_idle_fraction",
                "trainer_idle_fraction",
                "mean_trained_lag",
                "eval_before",
                "eval_after",
            )
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
