"""Cases of parametrized tests that only `make chaos` runs, because others show the same of the code."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only_in_chaos(*cases: Any) -> list[Any]:
    """These cases, marked. A tuple has the values of several parameters."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.chaos)
        for case in cases
    ]


def others_in_chaos(cases: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """All cases; `make test` runs those in `quick`."""
    cases = list(cases)
    assert all(case in cases for case in quick)
    return [each for case in cases for each in ([case] if case in quick else only_in_chaos(case))]
