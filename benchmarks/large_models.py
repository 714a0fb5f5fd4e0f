"""What the presets of large models need of a GPU and of a host's memory, by the trace of `areal-like plan`,
with and without the settings that make them fit.

    python -m benchmarks.large_models       # writes benchmarks/results/large_models.json, prints two tables
"""

from __future__ import annotations

import logging
from typing import Any

from areal_like.runtime.command_line import load_config
from benchmarks.report import table, write
from trainer.planning.gpus import GIB
from trainer.planning.planner import make_plan

WITHOUT = "trainer.offload_activations=false"
CASES: tuple[tuple[str, ...], ...] = (
    ("8x8h100_70b",),
    ("8x8h100_70b", WITHOUT),
    ("8x8h100_70b", WITHOUT, "trainer.context_parallel=2"),
    ("16x8h100_235b",),
    ("16x8h100_235b", "trainer.offload_optimizer=false"),
)
"""Preset and changed settings."""


def measured(preset: str, *settings: str) -> dict[str, Any]:
    """Figures of one plan, in GiB."""
    plan = make_plan(load_config([f"scale={preset}", *settings]))
    memory = plan.memory

    def rounded(parts: dict[str, float]) -> dict[str, float]:
        return {name: round(size / GIB, 2) for name, size in parts.items() if size > 0.005 * GIB}

    return {
        "preset": preset,
        "settings": settings,
        "num_params": plan.trace.num_params,
        "fits": plan.fits,
        "gpu": rounded(memory.trainer),
        "gpu_total": round(memory.trainer_total / GIB, 1),
        "rank_0_host": rounded(memory.rank_host),
        "rank_0_host_total": round(sum(memory.rank_host.values()) / GIB, 1),
        "other_rank_host_total": round(memory.other_rank_host / GIB, 1),
        "host_of_rank_0_total": round(memory.host_total / GIB, 1),
        "unevenness": round(plan.trace.unevenness, 3),
        "train_s": None if plan.estimate is None else round(plan.estimate.train_s),
    }


def printed(results: list[dict[str, Any]], *, parts: str, totals: dict[str, str]) -> None:
    """Prints a row for each part and a column for each result."""
    names = list(dict.fromkeys(name for result in results for name in result[parts]))
    heads = [" ".join((result["preset"], *result["settings"])) for result in results]
    rows = [[name, *(f"{result[parts].get(name, 0.0):.1f}" for result in results)] for name in names]
    rows += [[label, *(str(result[key]) for result in results)] for key, label in totals.items()]
    print(table(["GiB", *heads], rows))


def main() -> None:
    """Plans all cases."""
    logging.basicConfig(level=logging.ERROR)
    results = [measured(*case) for case in CASES]
    write("large_models", {"results": results})
    printed(results, parts="gpu", totals={"gpu_total": "total", "train_s": "training, s"})
    totals = {
        "rank_0_host_total": "rank 0",
        "other_rank_host_total": "another rank",
        "host_of_rank_0_total": "the host of rank 0",
    }
    printed(results, parts="rank_0_host", totals=totals)


if __name__ == "__main__":
    main()
