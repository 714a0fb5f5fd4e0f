"""The report on what was offered and what was trained on, from flat counters."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from areal_like.failures import FailureKind, FailurePolicy
from areal_like.selection import (
    LENGTHS,
    MAX_BUCKET,
    failure_key,
    length_bucket,
    length_key,
    lengths_of,
    percentile,
    selection_report,
    solve_rate_bucket,
)


@given(st.integers(1, 1 << 22))
def test_a_length_is_in_the_bucket_of_its_limits(num_tokens: int) -> None:
    bucket = length_bucket(num_tokens)
    assert bucket == MAX_BUCKET or num_tokens <= LENGTHS[bucket]
    assert bucket == 0 or num_tokens > LENGTHS[bucket - 1]


def test_solve_rates_have_buckets_of_their_own_at_the_ends() -> None:
    def bucket(*rewards: float, low: float = 0.0, high: float = 1.0) -> str:
        return solve_rate_bucket(rewards, low=low, high=high)

    assert [bucket(0, 0), bucket(1, 1), bucket(0, 1)] == ["0", "100", "50_75"]
    assert [bucket(0, 0, 0, 0, 1), bucket(0, 1, 0), bucket(1, 1, 1, 0, 1)] == ["0_25", "25_50", "75_100"]
    assert bucket(-1, 3, low=-1, high=3) == "50_75" and bucket(-5, low=-1) == "0" and bucket(9) == "100"


def test_percentiles_are_within_their_bucket() -> None:
    draw = random.Random(0)
    lengths = sorted(int(draw.paretovariate(1.1) * 20) for _ in range(1000))
    counters: dict[str, float] = {}
    for length in lengths:
        key = length_key("offered", length_bucket(length))
        counters[key] = counters.get(key, 0) + 1
    for percent in (1, 50, 90, 99):
        exact = lengths[percent * 10 - 1]
        estimate = percentile(lengths_of(counters, ["offered"]), percent)
        assert estimate is not None and exact / 2 <= estimate <= 2 * exact
    assert percentile([0] * (MAX_BUCKET + 1), 50) is None
    assert percentile([0] * MAX_BUCKET + [3], 50) == LENGTHS[-1]


def test_no_percentile_is_above_the_limit_of_a_turn() -> None:
    up_to_16 = [0, 0, 0, 2, 8] + [0] * (MAX_BUCKET - 4)
    assert [percentile(up_to_16, percent, limit=10) for percent in (20, 60, 100)] == [8.0, 9.0, 10.0]
    assert percentile(up_to_16, 100) == 16.0
    of_turns = [0, 0, 0, 2, 8, 1] + [0] * (MAX_BUCKET - 5)
    assert percentile(of_turns, 100, limit=10) == 32.0, "samples with several turns may be longer"


def test_a_report_compares_offered_with_trained() -> None:
    counters: dict[str, float] = {
        length_key("offered", 3): 8,
        length_key("offered", 10): 2,
        "offered_sum_tokens": 2100,
        "offered_sum_reward": 5.0,
        length_key("trained", 3): 6,
        "trained_sum_tokens": 40,
        "trained_sum_reward": 4.5,
        failure_key(FailureKind.REWARD_TIMEOUT, FailurePolicy.ZERO): 2,
        "tokens_wasted_stale": 70,
        "prompts_given_up": 3,
    }
    report = selection_report(counters)
    assert report["offered"] | {} == {
        "samples": 10,
        "tokens_mean": 210.0,
        "tokens_p50": 6.5,
        "tokens_p90": 768.0,
        "tokens_p99": 998.4,
        "reward_mean": 0.5,
    }
    assert (report["trained"]["samples"], report["trained"]["reward_mean"]) == (6, 0.75)
    assert report["failures"]["reward_timeout"]["zero"] == 2
    assert (report["tokens_wasted"], report["prompts_given_up"]) == ({"stale": 70}, 3)
    empty = selection_report({})
    assert empty["trained"]["tokens_mean"] is None and empty["failures"] == {}
