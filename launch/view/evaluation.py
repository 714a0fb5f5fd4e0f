"""The output of `areal-like eval`: lines while it runs, and a table of the sets at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from launch.observation.observer import Observation, find_number, find_table
from launch.view.formatting import duration, fixed, rate
from launch.view.plain import phase_line


class EvaluationView:
    """A `View` that writes a line when something has changed, at most every `interval_s`."""

    def __init__(self, write: Callable[[str], None], *, interval_s: float = 5.0) -> None:
        """`write` takes one line."""
        self._write, self._interval_s = write, interval_s
        self._due_s = 0.0
        self._last = ""

    def update(self, seen: Observation, *, phase: str, detail: str) -> None:
        """Writes the number of finished samples, or what the phase waits for."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        progress = "" if detail else progress_line(seen)
        line = progress or phase_line(seen, phase=phase, detail=detail)
        if line != self._last:
            self._last = line
            self.notice(line)

    def notice(self, text: str) -> None:
        """Writes one line with the time of day."""
        self._write(f"{time.strftime('%H:%M:%S')} {text}")

    def close(self) -> None:
        """Does nothing: there is no drawing to end."""


def progress_line(seen: Observation) -> str:
    """Prompts evaluated and left; empty before the first is issued."""
    tickets = find_table(seen.buffer, "tickets")
    num_issued = find_number(tickets, "issued") or 0
    if not num_issued:
        return ""
    num_done, num_failed = (find_number(tickets, name) or 0 for name in ("evaluated", "dropped"))
    failed = f" ({num_failed:.0f} failed)" if num_failed else ""
    speed = rate(seen.tokens_per_s_generated)
    return f"evaluated {num_done + num_failed:.0f} of {num_issued:.0f} prompts{failed}, {speed} tok/s"


def results_table(sets: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """A row for each set of `summary.json`."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("set", "prompts", "avg", "pass@k", "tokens", "time", ""):
        table.add_column(name)
    for name, row in sets.items():
        if "avg" not in row:
            table.add_row(name, "", "no result")
            continue
        passed = row["pass_at_k"].items() if row["num_samples"] > 1 else ()
        notes = [f"{row['truncated_fraction']:.0%} truncated"] if row["truncated_fraction"] else []
        notes += [f"{row['num_failed']} failed"] if row["num_failed"] else []
        table.add_row(
            name,
            f"{row['num_prompts']}" + (f" x {row['num_samples']}" if row["num_samples"] > 1 else ""),
            _average(row),
            "  ".join(f"{k}: {share:.3f}" for k, share in passed),
            f"{row['mean_tokens']:.1f}",
            duration(row["seconds"]),
            ", ".join(notes),
        )
    return table


def _average(row: Mapping[str, Any]) -> str:
    interval = ""
    if row["ci_low"] is not None and row["ci_high"] is not None:
        interval = f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return fixed(row["avg"], digits=3) + interval
