"""Formats numbers as short text: rates, durations, means."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours from one hour on: `3:07`, `1:02:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(value: float | None) -> str:
    """A rate in about three digits: `940`, `12.3k`; `-` for None."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def fixed(value: float | None, *, digits: int = 2) -> str:
    """A number with `digits` decimal places; `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"
