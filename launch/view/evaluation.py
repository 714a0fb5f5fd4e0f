"""The output of `areal-like eval`: lines while it runs, and a table of the sets at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from launch.observation.observer import Observation, find_number, find_table
from launch.view.formatting import fixed, rate


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
        line = f"{phase}: {detail}" if detail else progress_line(seen) or phase
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


def results_table(summary: Mapping[str, Any], *, title: str) -> Table:
    """A row for each set."""
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("reward")
    for name, row in summary.items():
        table.add_row(name, fixed(row.get("avg"), digits=3))
    return table
