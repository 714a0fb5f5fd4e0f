"""Tables and figure of benchmarks/simulate.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import pyplot
from trainer.planning.staleness import least_staleness

Rows = Sequence[dict[str, Any]]
ENOUGH = 0.95
"""Share of the limit that a bound should reach."""


def scale_table(rows: Rows) -> tuple[list[str], list[list[object]]]:
    """The long run, by tenths."""
    header = ["tickets", "CPU us a ticket, in the ledger", "largest lag", "MB of the process"]
    return header, [
        [f"{part['tickets']:,}", part["cpu_us_a_ticket"], part["lag_max"], part.get("rss_mb", "")]
        for part in rows[0]["parts"]
    ]


def rules_table(rows: Rows) -> tuple[list[str], list[list[object]]]:
    """A line for each job and rule."""
    header = ["durations", "rule", "of the limit", "lag mean", "lag max", "beyond the bound"]
    header += ["dropped", "lost"]
    return header, [
        [
            row["case"],
            row["rule"],
            f"{row['of_limit']:.0%}",
            f"{row['lag_mean']:.2f}",
            row["lag_max"],
            f"{row['beyond_bound']:.1%}",
            f"{row['dropped_share']:.1%}",
            f"{row['lost_share']:.1%}",
        ]
        for row in rows
    ]


def tails_table(rows: Rows) -> tuple[list[str], list[list[object]]]:
    """The smallest bound that reaches ENOUGH, as measured and by the formula."""
    header = ["spread", "slots / samples of a step", f"least bound for {ENOUGH:.0%}", "formula", "reached"]
    lines: list[list[object]] = []
    for spread, slots in dict.fromkeys((row["job"]["spread"], row["slots_a_step"]) for row in rows):
        those = [row for row in rows if (row["job"]["spread"], row["slots_a_step"]) == (spread, slots)]
        some = {row["job"]["max_staleness"]: row for row in those}
        enough = [bound for bound, row in sorted(some.items()) if row["of_limit"] >= ENOUGH]
        wanted = least_staleness(steps_a_sample=slots, spread=spread, samples=_samples(rows[0]))
        at = min((bound for bound in some if bound >= wanted), default=max(some))
        reached = f"{some[at]['of_limit']:.0%}"
        lines.append([spread, slots, enough[0] if enough else f"> {max(some)}", wanted, reached])
    return header, lines


def close_table(rows: Rows) -> tuple[list[str], list[list[object]]]:
    """A line for each job, bound and rule."""
    header = ["spread, longest / mean, slots", "bound", "rule", "of the limit", "goodput", "tokens beyond"]
    header += ["samples untrained", "lag mean", "lag max", "idle rollout", "idle trainer", "s a step waited"]
    return header, [
        [
            f"{row['job']['spread']:g}, {row['job']['longest']:g}, {row['slots_a_step']}",
            row["job"]["max_staleness"],
            row["rule"],
            f"{row['of_limit']:.0%}",
            f"{row['goodput']:.1%}",
            f"{max(0.0, row['beyond_tokens']):.1%}",
            f"{row['untrained']:.2%}",
            f"{row['lag_mean']:.2f}",
            row["lag_max"],
            f"{row['idle_generation']:.0%}",
            f"{max(0.0, row['idle_trainer']):.0%}",
            f"{max(0.0, row['waited_s']):.1f}",
        ]
        for row in rows
    ]


def _samples(row: dict[str, Any]) -> int:
    return int(row["job"]["groups_per_step"] * row["job"]["group_size"])


def draw(rows: Rows, path: Path) -> None:
    """Throughput by bound: one panel per spread, one line per number of slots."""
    spreads = list(dict.fromkeys(row["job"]["spread"] for row in rows))
    figure, panels = pyplot().subplots(1, len(spreads), figsize=(10, 3), sharey=True)
    for panel, spread in zip(panels, spreads, strict=True):
        for slots in dict.fromkeys(row["slots_a_step"] for row in rows):
            some = [row for row in rows if (row["job"]["spread"], row["slots_a_step"]) == (spread, slots)]
            bounds = [row["job"]["max_staleness"] for row in some]
            panel.plot(bounds, [row["of_limit"] for row in some], marker=".", label=f"{slots:g}")
        panel.axhline(ENOUGH, color="black", linewidth=0.6, linestyle=":")
        panel.set_title(f"spread of durations {spread:g}", fontsize=10)
        panel.set_xlabel("max_staleness")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("throughput / limit")
    panels[0].set_ylim(0, 1.05)
    panels[-1].legend(title="slots / samples of a step", frameon=False, fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
