"""Tables and figure of benchmarks/long_tails.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import pyplot, table

Row = dict[str, Any]
COLORS = {"wait": "tab:red", "drop": "tab:orange", "close": "tab:blue", "unbounded": "tab:gray"}
LAST_S = 10.0
"""A job's final reward is the mean of its evaluations in its last seconds."""


def as_tables(rows: Sequence[Row]) -> str:
    """A line for each side of each comparison, and what closing recovers."""
    header = ["objective", "bound", "side", "seeds", "steps", "tokens/s", "idle slots", "trainer waits"]
    header += [
        "longest step s",
        "lag mean",
        "max",
        "masked",
        "early members",
        "dropped groups",
        "held-out reward",
        "clean",
    ]
    lines = []
    for (objective, bound, side), some in groups_of(rows).items():
        lines.append(
            [
                objective,
                bound,
                side,
                len(some),
                f"{_mean(some, 'steps'):.0f}",
                f"{_mean(some, 'tokens_a_second'):.0f}",
                f"{_mean(some, 'idle_slots'):.1%}",
                f"{_mean(some, 'trainer_wait'):.1%}",
                f"{_mean(some, 'longest_step_s'):.1f}",
                f"{_mean(some, 'lag_mean'):.2f}",
                max(row["lag_max"] for row in some),
                f"{_mean(some, 'masked_share'):.1%}",
                f"{_mean(some, 'early_members'):.1f}" if side == "close" else "",
                f"{statistics.fmean(sum(row['drops'].values()) for row in some):.0f}",
                f"{statistics.fmean(map(final_reward, some)):.3f}",
                "yes" if all(row["audit_is_clean"] for row in some) else "NO",
            ]
        )
    found = [
        [f"{objective}, {bound}", f"{waiting:.1%}", f"{share:.0%}"]
        for objective, bound, waiting, share in recovered(rows)
    ]
    second = table(["objective, bound", "slots idle because steps wait", "recovered by close"], found)
    return table(header, lines) + "\n\n" + second


def groups_of(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """(objective, bound, side) -> the rows of its seeds."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["objective"], row["max_staleness"], row["side"]), []).append(row)
    return dict(sorted(found.items()))


def recovered(rows: Iterable[Row]) -> list[tuple[str, int, float, float]]:
    """(objective, bound, share of slots that idle because of waiting, share of it that close recovers).

    Slots that are idle with an unreached bound have another cause.
    """
    groups = groups_of(rows)
    free = {key[0]: _mean(some, "idle_slots") for key, some in groups.items() if key[2] == "unbounded"}
    found = []
    for objective, bound, side in groups:
        sides = [groups.get((objective, bound, one)) for one in ("wait", "close")]
        if side != "close" or objective not in free or not all(sides):
            continue
        wait, close = (_mean(some or [], "idle_slots") for some in sides)
        if wait > free[objective]:
            found.append(
                (objective, bound, wait - free[objective], (wait - close) / (wait - free[objective]))
            )
    return found


def final_reward(row: Row) -> float:
    """Mean held-out reward of the last seconds; of the last evaluation, if none falls into them."""
    evals = row["evals"] or [(0.0, 0.0)]
    last = [reward for at_s, reward in evals if at_s >= row["seconds"] - LAST_S]
    return statistics.fmean(last or [evals[-1][1]])


def reward_at(rows: Sequence[Row], at_s: float) -> float:
    """Mean over jobs of the newest evaluation at a time; before the first one, the first."""
    return statistics.fmean(
        next((reward for time_s, reward in reversed(row["evals"]) if time_s <= at_s), row["evals"][0][1])
        for row in rows
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Held-out reward by wall-clock time: a panel for each objective and bound."""
    groups = groups_of(row for row in rows if row["evals"])
    panels = sorted({key[:2] for key in groups if key[2] != "unbounded" and key[0] != "even"})
    if not panels:
        return
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3), sharey=True, squeeze=False
    )
    for axis, (objective, bound) in zip(axes[0], panels, strict=True):
        for (name, found_bound, side), some in groups.items():
            if name == objective and (found_bound == bound or side == "unbounded"):
                seconds = min(row["seconds"] for row in some)
                times = [seconds * index / 60 for index in range(61)]
                curve = [reward_at(some, at_s) for at_s in times]
                axis.plot(times, curve, color=COLORS[side], label=side, drawstyle="steps-post")
        axis.set_title(f"{objective}, max_staleness {bound}", fontsize=10)
        axis.set_xlabel("seconds of training")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out reward")
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
