"""Draws curves as text: from numbers to lines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille cell (U+2800) by row and column."""


def curve(values: Sequence[float], *, width: int, height: int, low: float, high: float) -> list[str]:
    """A curve in `width` x `height` characters of 2 x 4 braille dots each, top line first.

    `values` are averaged into 2 * `width` columns; those outside `low` to `high` are drawn at the edge.
    """
    columns, rows = 2 * width, 4 * height
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for column, value in enumerate(_binned(values, columns)):
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
        row = round((1 - share) * (rows - 1))
        # Connected to the previous dot, so that a jump is drawn as a vertical line.
        start = row if previous is None else previous
        for dot in range(min(row, start), max(row, start) + 1):
            cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
        previous = row
    return ["".join(chr(0x2800 + bits) for bits in line) for line in cells]


def _binned(values: Sequence[float], num_bins: int) -> list[float]:
    """`values` themselves, or `num_bins` means over equal stretches of them when there are more."""
    if len(values) <= num_bins:
        return list(values)
    edges = [round(i * len(values) / num_bins) for i in range(num_bins + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
