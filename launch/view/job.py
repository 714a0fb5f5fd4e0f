"""The view of a running job's rates, leases and weights (`areal-like status`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from launch.view.formatting import fixed, rate


def rates_line(report: Mapping[str, Any]) -> Text:
    """What has happened within the last minute."""
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
    """How far the run is."""
    text = Text.assemble(("step ", "dim"), f"{report['step']} of {report['num_steps']}")
    text.append("  saved ", style="dim").append(str(report["committed_steps"]))
    text.append("  newest weights ", style="dim").append(f"v{report['newest_version']}")
    if reason := report["closed_because"] or report["failed_because"]:
        text.append(f"  closed: {reason}", style="yellow")
    return text


def server_table(report: Mapping[str, Any]) -> Table | None:
    """Leases and weights by rollout server; None without servers."""
    servers = [each for each in report["daemons"] if each["role"] == "rollout"]
    if not servers:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for heading in ("server", "leases", "oldest", "weights", "behind", "for", "tok/s"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "server" else "right")
    for each in servers:
        behind = each["versions_behind"]
        table.add_row(
            each["name"],
            _count(each["leases"]),
            _seconds(each["oldest_lease_s"]),
            "" if each["weights_version"] is None else f"v{each['weights_version']}",
            _count(behind),
            _seconds(each["weights_age_s"]),
            rate(each["tokens_per_s"]),
        )
    return table


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _seconds(value: Any) -> str:
    return "" if value is None else f"{value:.1f} s"
