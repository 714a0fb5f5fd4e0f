"""Simulates large jobs: the real ledger under a virtual clock, and two other staleness rules.

    python -m benchmarks.simulate scale [--tickets 1000000]   4,096 servers: CPU per ticket, lag, throughput
    python -m benchmarks.simulate rules                       the ledger, a gate at the start, late drops
    python -m benchmarks.simulate tails                       the max_staleness that a tail of durations needs
    python -m benchmarks.simulate close                       wait, a gate, drop and close, with ages by token
    python -m benchmarks.simulate report                      the tables, and docs/simulation.png

`benchmarks/simulation_world.py` has the model of a job. Throughput is a share of the analytic limit, the
slower of the two pools without any waiting: `max(step_s, samples of a step x mean_s / (slots x up))`. The
measurements of `tails` are compared with the formula of `areal-like plan` (`trainer/planning/staleness.py`).
The results are in benchmarks/results/simulate.jsonl; a part that is run again replaces its earlier results.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from areal_like.runtime.freed_memory import resident_bytes
from benchmarks.report import RESULTS, ROOT, machine, table
from benchmarks.simulation_report import close_table, draw, rules_table, scale_table, tails_table
from benchmarks.simulation_rules import CLOSE_RULES, RULES, LedgerRule
from benchmarks.simulation_world import Job
from buffer.__main__ import GC_THRESHOLDS

RESULT = RESULTS / "simulate.jsonl"
SCALE = Job(num_servers=4096, groups_per_step=8192, spread=0.5)
RULE_JOBS = {
    "log-normal, spread 1.0": Job(spread=1.0),
    "log-normal, spread 1.5": Job(spread=1.5),
    "Pareto, exponent 1.5": Job(tail="pareto", spread=1.5),
}
BOUNDS = (0, 1, 2, 4, 8, 16, 32)
SLOTS_A_STEP = (1.0, 2.0, 4.0)
"""Slots of all servers divided by samples of a step: the number of steps in progress at a time."""
SPREADS = (0.5, 1.0, 1.5)
NUM_STEPS = 80
CLOSE_TAILS = ((0.5, 4), (0.5, 8), (1.0, 4), (1.0, 8), (1.5, 4), (1.5, 8), (1.5, 16))
"""Spread, and the longest sample divided by the mean."""
CLOSE_SLOTS_A_STEP = (1, 2)
CLOSE_BOUNDS = (4, 8, 16)


def scale(num_tickets: int) -> Iterator[dict[str, Any]]:
    """A long run of many servers, with figures for each tenth of it."""
    simulation = LedgerRule(SCALE)
    parts: list[dict[str, float]] = []
    started_s = time.monotonic()
    for part in range(1, 11):
        before = simulation.num_tickets, simulation.cpu_s
        while simulation.num_tickets < num_tickets * part // 10:
            simulation.run(simulation.step + 1)
        num_new = simulation.num_tickets - before[0]
        parts.append(
            {
                "tickets": simulation.num_tickets,
                "cpu_us_a_ticket": round(1e6 * (simulation.cpu_s - before[1]) / max(1, num_new), 1),
                "lag_max": max(simulation.lags),
                "rss_mb": round(resident_bytes() / 1e6),
            }
        )
        print(parts[-1], flush=True)
    result = simulation.results()
    share = simulation.cpu_s / simulation.step / result["step_s"]
    yield result | {
        "parts": parts,
        "ledger_share_of_a_step": round(share, 5),
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def rules() -> Iterator[dict[str, Any]]:
    """The three rules on the same jobs."""
    for title, job in RULE_JOBS.items():
        for rule in RULES:
            simulation = rule(job)
            simulation.run(NUM_STEPS)
            yield {"case": title, "rule": rule.title} | simulation.results()


def tails() -> Iterator[dict[str, Any]]:
    """The ledger for each spread, number of slots and bound; both pools need the same time for a step."""
    for spread in SPREADS:
        for slots in SLOTS_A_STEP:
            for bound in BOUNDS:
                base = Job(spread=spread, max_staleness=bound, failures_an_hour=0.0, push_s=0.0)
                num_servers = round(slots * base.samples_a_step / base.slots)
                job = replace(base, num_servers=num_servers)
                job = replace(job, step_s=job.generation_step_s)
                simulation = LedgerRule(job)
                simulation.run(NUM_STEPS)
                yield {"slots_a_step": slots} | simulation.results()


def close() -> Iterator[dict[str, Any]]:
    """The rules with ages by token; both pools need the same time for a step."""
    for spread, longest in CLOSE_TAILS:
        for slots in CLOSE_SLOTS_A_STEP:
            for bound in CLOSE_BOUNDS:
                for rule in CLOSE_RULES:
                    simulation = rule(close_job(spread, longest, slots, bound))
                    simulation.run(NUM_STEPS)
                    yield {"slots_a_step": slots, "rule": rule.title} | simulation.results()


def close_job(spread: float, longest: float, slots: int, max_staleness: int) -> Job:
    """A job of `close`: `slots` slots for each sample of a step, and a trainer as fast as they are."""
    job = Job(
        num_servers=8 * slots,
        slots=32,
        queue=4,
        spread=spread,
        longest=longest,
        max_staleness=max_staleness,
        failures_an_hour=0.0,
        push_s=0.0,
    )
    return replace(job, step_s=job.generation_step_s)


def read(part: str) -> list[dict[str, Any]]:
    """The results of a part."""
    lines = RESULT.read_text().splitlines() if RESULT.exists() else []
    return [row for row in map(json.loads, lines) if row["part"] == part]


def main() -> None:
    """Runs one part, or prints the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["scale", "rules", "tails", "close", "report"])
    parser.add_argument("--tickets", type=int, default=1_000_000)
    args = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)  # as in the daemon
    if args.part != "report":
        parts = {"scale": lambda: scale(args.tickets), "rules": rules, "tails": tails, "close": close}
        rows = []
        for row in parts[args.part]():
            rows.append({"part": args.part, "machine": machine()} | row)
            print({key: row[key] for key in _PRINTED}, flush=True)
        _replace(args.part, rows)
    for make, part in (
        (scale_table, "scale"),
        (rules_table, "rules"),
        (tails_table, "tails"),
        (close_table, "close"),
    ):
        if found := read(part):
            print(table(*make(found)) + "\n")
    if found := read("tails"):
        draw(found, ROOT / "docs" / "simulation.png")


_PRINTED = ("of_limit", "goodput", "lag_mean", "lag_max", "dropped_share")


def _replace(part: str, rows: list[dict[str, Any]]) -> None:
    others = RESULT.read_text().splitlines() if RESULT.exists() else []
    kept = [line for line in others if json.loads(line)["part"] != part]
    text = "\n".join([*kept, *map(json.dumps, rows)]) + "\n"
    Path(RESULT).write_text(text)


if __name__ == "__main__":
    main()
