"""The order of a mixture's sources."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.data.mixture import place_of

WEIGHTS = st.lists(st.floats(0.001, 1000) | st.integers(1, 9), min_size=1, max_size=12)
PHASES = st.floats(0, 1, exclude_max=True)


@settings(max_examples=30)
@given(weights=WEIGHTS, phase=PHASES, first=st.integers(0, 1 << 40))
def test_weights_hold_in_every_window(weights: list[float], phase: float, first: int) -> None:
    drawn = Counter(place_of(first + index, weights, phase=phase)[0] for index in range(1000))
    for source, weight in enumerate(weights):
        assert abs(drawn[source] - 1000 * weight / sum(weights)) < 5  # half a percent


@settings(max_examples=30)
@given(weights=WEIGHTS, phase=PHASES)
def test_draws_of_a_source_are_numbered(weights: list[float], phase: float) -> None:
    drawn = Counter[int]()
    for index in range(300):
        source, number = place_of(index, weights, phase=phase)
        assert number == drawn[source]
        drawn[source] += 1


def test_order_is_the_same_in_every_release() -> None:
    assert [place_of(index, [2, 1, 1])[0] for index in range(12)] == [0, 1, 0, 2, 0, 0, 1, 0, 2, 1, 0, 2]
    assert place_of(10**12, [2, 1, 1]) == (2, 250000000004)
