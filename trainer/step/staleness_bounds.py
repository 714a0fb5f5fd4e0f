"""Warns if learning rate and staleness together exceed what the method tolerated in the grid.

The grid (docs/results.md, Staleness) has, for some methods and ages, the largest learning rate at which a run
still kept 80 % of the method's best on-policy reward. `staleness_bounds.json` holds these bounds; `python -m
benchmarks.staleness --report` writes it from the results. A job is compared by learning rate x lag with the
bound at the smallest age of the grid that is not below its `max_staleness` (beyond the grid, at the largest
age). Mixed ages, as in a real queue, take precedence over fixed ones.

The grid used a model of 105,000 parameters, the sorting task, completions of up to ten tokens, 400 steps, 64
samples a step, and a constant learning rate. Larger models and longer completions usually tolerate less, so a
job without a warning is not necessarily safe. There is no warning for a method that is not in the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from areal_like.config import Config
from trainer.objectives import Composed, Objective, build_objective


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The learning rates that one method tolerated at one age."""

    mode: str
    """Ages of the samples: `fixed` | `mixed`."""
    lag: int
    """Age of every sample (fixed), or the largest (mixed)."""
    lr: float
    """Largest learning rate that it tolerated; 0: none of those tried."""
    failed_lr: float
    """Smallest learning rate that it did not tolerate; 0: it tolerated all of those tried."""
    failed_reward: float
    """Reward at `failed_lr`."""


def staleness_warning(config: Config, objective: Objective) -> str:
    """The warning for the user at the start of a job; empty if there is none."""
    found = _method_of(objective, max_tokens=config.sampling.max_new_tokens)
    lag, lr = config.staleness_cap, config.trainer.lr
    if found is None or lag == 0:
        return ""
    bound, failure = _bound_at(found["rows"], lag)
    if failure is None or lr <= bound.lr or (bound.lr == 0 and lr < failure.failed_lr):
        return ""
    limit = bound.lr or failure.failed_lr
    relation = (
        f"{lr / limit:.1f} times what it tolerated at that lag ({limit:g} x {lag})"
        if bound.lr
        else f"beyond what it tolerated: not even the smallest rate that was tried, {limit:g}"
    )
    return (
        f"trainer.lr={lr:g} at max_staleness={lag}: learning rate x lag is {lr * lag:.2g}, {relation} in the "
        f"staleness grid, where {found['method']} at {failure.failed_lr:g} and {failure.mode} ages of "
        f"{failure.lag} steps ended at {failure.failed_reward:.2f} of {found['best']:.2f}. That is of a "
        "small model on the sorting task; larger ones usually tolerate less. Lower trainer.lr or "
        "max_staleness, or choose a method that tolerates more (docs/results.md, Staleness)"
    )


def _method_of(objective: Objective, *, max_tokens: int) -> dict[str, Any] | None:
    """The table's entry with the same settings, ignoring masks and terms.

    Without one, the entry of the same class that tolerates the most.
    """
    inner = objective.inner if isinstance(objective, Composed) else objective
    entries = [(each, build_objective(each["objective"], max_tokens=max_tokens)) for each in _table()]
    alike = [each for each, built in entries if type(built) is type(inner)]
    same = [each for each, built in entries if built == inner]
    ranked = same or sorted(alike, key=lambda each: -sum(row["lr"] for row in each["rows"]))
    return ranked[0] if ranked else None


def _bound_at(rows: list[dict[str, Any]], lag: int) -> tuple[Bound, Bound | None]:
    """Returns (the bound for a job with this lag, the entry at which a larger learning rate failed).

    The bound is the one at the smallest age from `lag` on, or at the largest age; mixed before fixed. If no
    larger rate was tried there, a failure at a smaller age is taken; None if there is none.
    """
    found = [Bound(**row) for row in rows]
    enough = [bound for bound in found if bound.lag >= lag]
    lags = [bound.lag for bound in enough or found]
    age = min(lags) if enough else max(lags)
    bound = min((each for each in found if each.lag == age), key=lambda each: each.mode != "mixed")
    if bound.failed_lr:
        return bound, bound
    failures = [each for each in found if each.lag < age and each.failed_lr > bound.lr]
    return bound, min(failures, key=lambda each: each.failed_lr, default=None)


@cache
def _table() -> list[dict[str, Any]]:
    text = (resources.files("trainer.step") / "staleness_bounds.json").read_text()
    methods: list[dict[str, Any]] = json.loads(text)["methods"]
    return methods
