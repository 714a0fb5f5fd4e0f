"""Numbers, times and the ticks of axes as a person reads and types them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime

_MULTIPLES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float | None) -> str:
    """About four digits: `0.1234`, `12.3`, `4,810`, `1.234M`, `2.10e-05`; `-` for None and NaN."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 1e4:
        for factor, letter in _MULTIPLES:
            if size >= factor:
                return f"{value / factor:.4g}{letter}" if size / factor < 1000 else f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    if value == int(value):
        return str(int(value))
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}".rstrip("0") if size < 1 else f"{value:.4g}"


def rate(value: float | None) -> str:
    """As `short`; `<0.01` for what rounds to 0.00, such as a mean whose last terms were 0."""
    return "<0.01" if value is not None and 0 < value < 0.005 else short(value)


def count(value: float | None) -> str:
    """All digits of a whole number: `12,345`; `-` for None."""
    return "-" if value is None else f"{value:,.0f}"


def fixed(value: float | None, *, digits: int = 2) -> str:
    """A number with `digits` decimal places; `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """`12.3 %`; `-` for None and NaN."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.3g} %"


def duration(seconds: float | None) -> str:
    """`1.25 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def typed_seconds(text: str) -> float:
    """The seconds in `90`, `90s`, `10m`, `2h` or `1d`. Raises ValueError."""
    if (match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smhd]?)", text)) is None:
        raise ValueError(f"{text!r} is not a time such as 60s or 5m")
    return float(match[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


def utc(unix_s: float | None) -> str:
    """`2026-11-23 09:02:11 UTC`."""
    if unix_s is None or not 0 <= unix_s < 1e11:
        return "-"
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers within [low, high], about `count` of them, 1, 2 or 5 times a power of ten apart."""
    assert low < high
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """The ticks as text with as many decimals as they need to differ."""
    if not values:
        return []
    largest = max(abs(value) for value in values)
    step = abs(values[1] - values[0]) if len(values) > 1 else largest
    if largest >= 1e4:
        factor, letter = next(one for one in _MULTIPLES if largest >= one[0])
        step, scaled = step / factor, [value / factor for value in values]
    else:
        letter, scaled = "", list(values)
        if 0 < largest < 1e-3:
            return [f"{value:.3g}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value:.{decimals}f}{letter}" if value else "0" for value in scaled]
