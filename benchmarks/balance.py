"""The share of the ranks' time that is work, for steps with a long-tailed distribution of sequence lengths.

    python -m benchmarks.balance

No time is measured; the costs are those of the planner: a step's sequences (128 groups of 8) on 4, 32 and 256
ranks, for a model of the shape of Qwen3-8B. A row costs 6 FLOPs for each weight, a pair of positions 12 for
each layer and head size. Ranks run micro-batches in lockstep, so a step takes the sum over rounds of its most
expensive micro-batch. A micro-batch has at most --budget tokens.

    streaming   group j goes to rank j mod W, which cuts its groups in order (next fit)
    balanced    trainer/batching/balance.py, with the prompts of a group computed once where they are together
    apart       the same without shared prompts
    bound       no assignment can be better: the longest sequence is not divided

`time` is relative to all ranks always working and every prompt computed once. `sent` is the number of tokens
that travel to a rank other than the one that fetched them. Writes benchmarks/results/balance.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import table, write
from trainer.batching.balance import Cost, SequenceSize, plan
from trainer.batching.balancer import placed
from trainer.batching.shared_prefixes import budget_size

COST = Cost(per_row=6 * 8_190_000, per_pair=12 * 36 * 4096 // 1000)
"""Cost in kiloflops."""
RANKS = (4, 32, 256)
GOAL = 0.95
LENGTHS = {"long tail": (400, 6000, 1.0), "mild tail": (1000, 2000, 0.5)}
"""Name -> tokens of a prompt; median and deviation of the logarithm of a completion's tokens."""
LONGEST = 31_744


def sizes_of(prompt: int, median: int, deviation: float, *, shared: bool = True) -> list[SequenceSize]:
    """128 groups of 8 samples."""
    rng = np.random.default_rng(0)
    sizes = []
    for group in range(128):
        answers = np.clip(rng.lognormal(np.log(median), deviation, 8), 16, LONGEST - prompt)
        for place, answer in enumerate(answers.astype(int).tolist()):
            prefix = prompt if place and shared else 0
            sizes.append(SequenceSize(group=group, num_tokens=prompt + answer, prefix=prefix))
    return sizes


def streaming(sizes: Sequence[SequenceSize], *, num_ranks: int, budget_tokens: int) -> tuple[int, int]:
    """(cost of all micro-batches, cost of the rounds' most expensive ones)"""
    costs_of: list[list[int]] = []
    for rank in range(num_ranks):
        costs, room, last = [], 0, -1
        for size in sizes:
            if size.group % num_ranks != rank:
                continue
            prefix = size.prefix if size.group == last else 0
            if budget_size(size.num_tokens, prefix=prefix) > room:
                costs.append(0)
                room, prefix = budget_tokens, 0
            room -= budget_size(size.num_tokens, prefix=prefix)
            costs[-1] += COST.of(size.num_tokens, prefix=prefix)
            last = size.group
        costs_of.append(costs)
    rounds = [
        [costs[at] if at < len(costs) else 0 for costs in costs_of] for at in range(max(map(len, costs_of)))
    ]
    return sum(map(sum, rounds)), sum(map(max, rounds))


def measure(name: str, *, num_ranks: int, budget_tokens: int) -> dict[str, Any]:
    """The shares of one case."""
    sizes = sizes_of(*LENGTHS[name])
    least = sum(COST.of(size.num_tokens, prefix=size.prefix) for size in sizes)
    work, taken = streaming(sizes, num_ranks=num_ranks, budget_tokens=budget_tokens)
    apart_sizes = sizes_of(*LENGTHS[name], shared=False)
    apart_work, apart_taken = streaming(apart_sizes, num_ranks=num_ranks, budget_tokens=budget_tokens)
    began = time.process_time()
    made = plan(sizes, num_ranks=num_ranks, budget_tokens=budget_tokens, cost=COST)
    plan_ms = 1e3 * (time.process_time() - began)
    apart = plan(apart_sizes, num_ranks=num_ranks, budget_tokens=budget_tokens, cost=COST)
    owners = [size.group % num_ranks for size in sizes]
    sent = sum(
        sizes[index].num_tokens
        for each in placed(made, sizes, owners, num_ranks=num_ranks)
        for rank, members in enumerate(each)
        for index in members
        if owners[index] != rank
    )
    longest = max(COST.of(size.num_tokens, prefix=0) for size in sizes)
    return {
        "lengths": name,
        "ranks": num_ranks,
        "rounds": len(made.rounds),
        "busy": {
            "streaming, apart": apart_work / (num_ranks * apart_taken),
            "streaming": work / (num_ranks * taken),
            "balanced, apart": apart.busy_share,
            "balanced": made.busy_share,
            "bound": min(1.0, least / (num_ranks * longest)),
        },
        "time": {
            "streaming, apart": num_ranks * apart_taken / least,
            "streaming": num_ranks * taken / least,
            "balanced": num_ranks * made.time / least,
        },
        "plan_ms": round(plan_ms, 1),
        "sent_share": sent / sum(size.num_tokens for size in sizes),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=int, default=65_536)
    args = parser.parse_args()
    rows = [measure(name, num_ranks=ranks, budget_tokens=args.budget) for name in LENGTHS for ranks in RANKS]
    write("balance", {"goal": GOAL, "budget_tokens": args.budget, "cases": rows})
    busy = ("streaming, apart", "streaming", "balanced, apart", "balanced", "bound")
    times = ("streaming, apart", "streaming", "balanced")
    print(
        table(
            [
                *("lengths", "ranks", *(f"busy: {kind}" for kind in busy)),
                *(*(f"time: {kind}" for kind in times), "rounds", "plan ms", "sent"),
            ],
            [
                [
                    *(row["lengths"], row["ranks"], *(f"{row['busy'][kind]:.2f}" for kind in busy)),
                    *(f"{row['time'][kind]:.2f}" for kind in times),
                    *(row["rounds"], f"{row['plan_ms']:.0f}", f"{row['sent_share']:.0%}"),
                ]
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
