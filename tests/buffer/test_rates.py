"""Rates over the last minute, and the age of servers' weights."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.service.status import WINDOW_S, RateWindow, RecentNumbers


def test_rates_are_those_of_the_last_minute() -> None:
    window = RateWindow()
    assert window.rate("x", 5, now_s=0.0) is None, "nothing was seen"
    for tick in range(4 * 200):
        now_s = tick / 4
        window.see({"x": 2 * now_s if now_s < 100 else 200 + 10 * (now_s - 100)}, now_s=now_s)
    assert window.rate("x", 200 + 10 * 100, now_s=200.0) == pytest.approx(10)
    assert WINDOW_S <= window.seconds(now_s=200.0) <= WINDOW_S + 1.25
    assert window.rate("new", 122, now_s=200.0) == pytest.approx(2, rel=0.03)
    assert window.rate("x", 0, now_s=200.0) == 0, "a counter that went back"


def test_a_new_buffer_knows_no_rate_at_first() -> None:
    window = RateWindow()
    window.see({"x": 100}, now_s=7.0)
    assert window.rate("x", 101, now_s=7.2) is None
    assert window.rate("x", 104, now_s=9.0) == pytest.approx(2)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 1000)), min_size=1, max_size=300))
def test_memory_is_bounded_and_rates_are_not_negative(steps: list[tuple[float, int]]) -> None:
    window, now_s, value = RateWindow(), 0.0, 0
    for pause_s, increase in steps:
        now_s, value = now_s + pause_s, value + increase
        window.see({"x": value}, now_s=now_s)
        assert len(window._seen) <= WINDOW_S + 2
        rate = window.rate("x", value, now_s=now_s)
        assert rate is None or rate >= 0


def server(name: str, version: int, *granted_s: float) -> Any:
    leases = {index: SimpleNamespace(granted_s=each) for index, each in enumerate(granted_s)}
    return SimpleNamespace(name=name, weights_version=version, leases=leases)


def test_leases_and_weights_of_a_server() -> None:
    recent = RecentNumbers()
    leases = SimpleNamespace(servers={})
    state: Any = SimpleNamespace(steps=SimpleNamespace(current=3), drops=Counter(), leases=leases)
    counters = {"samples_accepted": 0.0, "tokens_generated": 0.0, "tokens_trained": 0.0}
    for now_s, version in ((0.0, 4), (5.0, 4), (10.0, 5), (12.0, 5)):
        leases.servers["a"] = server("a", version)
        recent.see(state, counters, now_s=now_s)
    entry = recent.of_server(server("a", 5, 9.0, 11.5), newest_version=7, now_s=13.0)
    assert entry == {"leases": 2, "oldest_lease_s": 4.0, "weights_age_s": 3.0, "versions_behind": 2}
    entry = recent.of_server(server("a", 6), newest_version=6, now_s=13.0)
    assert entry == {"leases": 0, "oldest_lease_s": None, "weights_age_s": 0.0, "versions_behind": 0}
    rates = recent.rates(state, counters | {"samples_accepted": 26.0}, now_s=13.0)
    assert rates["samples_per_s"] == 2.0 and rates["steps_per_min"] == 0.0 and rates["window_s"] == 13.0
