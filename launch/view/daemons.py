"""The part of the view about daemons and tickets; `areal-like status` shows only this part."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table
from rich.text import Text

from launch.observation.observer import DaemonView, Observation, find_number, find_table

_NARROW = 80
"""A terminal with fewer columns gets the table without its numbers, to leave room for the reasons."""


_STATES = {"trained": "trained and saved"}
"""Names of states for a reader: a ticket that was trained is `batched` until a checkpoint contains it."""


def daemon_table(daemons: list[DaemonView], *, width: int, one_line: bool = False) -> Table:
    """A table with one row per daemon; `width`: of the terminal, in characters.

    The last column has the reason why a daemon is not ready, and takes the rest of the line. The reason wraps
    and is shown whole; with `one_line` it is cut at the end of the line.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    numbers = ("version", "queue", "heartbeat") if width >= _NARROW else ()
    for heading in ("daemon", "state", *numbers):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    table.add_column("waiting for", overflow="fold")
    for daemon in daemons:
        status = daemon.status or {}
        reason = daemon.not_ready
        state = str(status.get("state") or ("ready" if not reason else "not ready"))
        cells = (
            _first_number(status, "weights_version", "version", "newest_version"),
            _first_number(status, "queue", "ready", "running", "in_flight"),
            f"{time.monotonic() - daemon.seen_s:.0f} s ago" if daemon.seen_s else "never",
        )
        table.add_row(
            daemon.name,
            Text(state, style="yellow" if reason else "green"),
            *cells[: len(numbers)],
            _waiting_for(status, reason="" if reason == state else reason, one_line=one_line),
        )
    return table


def tickets_line(seen: Observation) -> Text:
    """Numbers of tickets by state, then numbers of dropped tickets by reason."""
    drops = {reason: count for reason, count in find_table(seen.buffer, "drops").items() if count}
    states = find_table(seen.buffer, "tickets")
    text = Text.assemble(("tickets ", "dim"))
    text.append(
        "  ".join(
            f"{_STATES.get(state, state)} {count:,}"
            for state, count in states.items()
            if isinstance(count, int)
        )
    )
    if drops:
        text.append(
            f"  ({', '.join(f'{reason} {count:,}' for reason, count in drops.items())})", style="yellow"
        )
    return text


def _waiting_for(status: dict[str, Any], *, reason: str, one_line: bool) -> Text:
    """The reason why the daemon is not ready, then its longest wait."""
    waits = status.get("waiting_on") or {}
    longest = max(waits.items(), key=lambda item: item[1], default=None)
    wait = f"{longest[0]} {longest[1]:.1f} s" if longest else ""
    separator = "; " if reason and wait else ""
    if not one_line:
        return Text.assemble((reason, "yellow"), f"{separator}{wait}")
    reason = " ".join(reason.split())  # it may have several lines
    return Text.assemble((reason, "yellow"), f"{separator}{wait}", no_wrap=True, overflow="ellipsis")


def _first_number(status: dict[str, Any], *keys: str) -> str:
    """The first of these numbers that the status has."""
    numbers = (find_number(status, key) for key in keys)
    return next((f"{number:.0f}" for number in numbers if number is not None), "")
