"""The distribution of lengths in a split, stored in four bytes per value."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


class LengthSample:
    """Lengths of prompts or responses, in characters or tokens."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._values = array("I", values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, length: int) -> None:
        self._values.append(length)

    def summary(self, *, limit: int | None = None) -> dict[str, Any] | None:
        """Returns num, min, mean, p50, p90, p99 and max; None if there are no values.

        A percentile is the smallest length that at least this share of the rows does not exceed. `limit`: the
        largest length that can be used; `over` then counts the values above it.
        """
        if not self._values:
            return None
        lengths = np.frombuffer(self._values, dtype=np.uint32)
        percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        found: dict[str, Any] = {
            "num": len(lengths),
            "min": int(lengths.min()),
            "mean": round(float(lengths.mean()), 2),
            **{f"p{share}": int(value) for share, value in zip(PERCENTILES, percentiles, strict=True)},
            "max": int(lengths.max()),
        }
        if limit is not None:
            found |= {"limit": limit, "over": int((lengths > limit).sum())}
        return found
