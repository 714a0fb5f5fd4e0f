"""The tables and lines of `areal-like status`: daemons, tickets, rates, leases and weights. The live view
also shows daemons and tickets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launch.formatting import count, duration, fixed, rate
from launch.observation.observer import DaemonView, Observation, find_number, find_table

_NARROW = 80
"""On a narrower terminal the table has no numbers, to leave room for the reasons."""

_STATES = {"trained": "trained and saved"}
"""State -> its name in the view: a trained ticket is `batched` until a checkpoint contains it."""
_OF_CLOSING = ("closed", "split")
"""States that only a run with `buffer.overdue=close` has."""


def daemon_table(daemons: list[DaemonView], *, width: int, one_line: bool = False) -> Table:
    """A table with one row per daemon; `width`: width of the terminal, in characters.

    The last column has the reason why a daemon is not ready, and takes the rest of the line. The reason wraps
    and is shown whole; with `one_line` it is cut at the end of the line.
    """
    numbers = ("version", "queue", "heartbeat") if width >= _NARROW else ()
    table = plain_table(("daemon", "state", *numbers), no_wrap=True, overflow="ellipsis")
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
            if isinstance(count, int) and (count or state not in _OF_CLOSING)
        )
    )
    if drops:
        text.append(
            f"  ({', '.join(f'{reason} {count:,}' for reason, count in drops.items())})", style="yellow"
        )
    return text


def rates_line(report: Mapping[str, Any]) -> Text:
    """The rates of the last minute."""
    rates = report["rates"]
    window_s = rates.get("window_s")
    text = Text.assemble(("last minute " if (window_s or 0) >= 59 else f"last {window_s or 0:.0f} s ", "dim"))
    items = (
        ("samples", f"{fixed(rates.get('samples_per_s'), digits=1)}/s"),
        ("generated", f"{rate(rates.get('tokens_generated_per_s'))} tok/s"),
        ("trained", f"{rate(rates.get('tokens_trained_per_s'))} tok/s"),
        ("steps", f"{fixed(rates.get('steps_per_min'), digits=1)}/min"),
        ("dropped", f"{fixed(rates.get('drops_per_min'), digits=1)}/min"),
    )
    for name, value in items:
        if not value.startswith("-"):
            text.append(f" {name} ", style="dim").append(f"{value} ")
    return text


def steps_line(report: Mapping[str, Any]) -> Text:
    """The progress of the run."""
    text = Text.assemble(("step ", "dim"), f"{report['step']} of {report['num_steps']}")
    text.append("  saved ", style="dim").append(str(report["committed_steps"]))
    text.append("  newest weights ", style="dim").append(f"v{report['newest_version']}")
    if reason := report["closed_because"] or report["failed_because"]:
        text.append(f"  closed: {reason}", style="yellow")
    return text


def bound_line(report: Mapping[str, Any]) -> Text:
    """The staleness bound in force; with closed groups, also their samples in progress."""
    text = Text.assemble(("bound ", "dim"), report["bound"])
    for name, label in (("waiting", "parts that wait"), ("late_running", "late samples")):
        if isinstance(number := report["parts"].get(name), int) and number:
            text.append(f"  {label} ", style="dim").append(f"{number:,}")
    return text


def server_table(report: Mapping[str, Any]) -> Table | None:
    """Leases and weights by rollout server; None without servers."""
    servers = [each for each in report["daemons"] if each["role"] == "rollout"]
    if not servers:
        return None
    rows = [
        (
            each["name"],
            count(each["leases"]),
            duration(each["oldest_lease_s"]),
            "-" if each["weights_version"] is None else f"v{each['weights_version']}",
            count(each["versions_behind"]),
            duration(each["weights_age_s"]),
            rate(each["tokens_per_s"]),
        )
        for each in servers
    ]
    table = plain_table(
        ("server", "leases", "oldest", "weights", "behind", "for", "tok/s"),
        rows,
        no_wrap=True,
        justify="right",
    )
    table.columns[0].justify = "left"
    return table


def plain_table(
    headings: Sequence[str] = (), rows: Iterable[Sequence[RenderableType]] = (), **options: Any
) -> Table:
    """A table without lines. `options`: of its columns; long cells are folded by default."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for heading in headings:
        table.add_column(heading, **({"overflow": "fold"} | options))
    for row in rows:
        table.add_row(*row)
    return table


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
