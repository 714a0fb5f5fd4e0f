"""Statistics of evaluations, against enumeration, published formulas and simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from areal_like.evaluation.statistics import (
    EvalStatistics,
    confidence_interval,
    pass_at_k,
    student_t,
    wilson_interval,
)

COUNTS = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(COUNTS)
def test_pass_at_k_is_the_share_of_all_subsets(counts: tuple[int, int, int]) -> None:
    num_samples, num_solved, k = counts
    solved = [index < num_solved for index in range(num_samples)]
    subsets = list(itertools.combinations(solved, k))
    share = sum(map(any, subsets)) / len(subsets)
    assert pass_at_k(num_samples, num_solved, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_formula_of_the_paper(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    # The numerically stable program of Chen et al. 2021, figure 3.
    theirs = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-9)
    assert pass_at_k(n, c, k) == pytest.approx(float(theirs), abs=1e-9)


@pytest.mark.parametrize("counts", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="solved among"):
        pass_at_k(*counts)


@pytest.mark.parametrize(
    ("dof", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (29, 2.04523), (100, 1.98397), (1000, 1.96234)],
)
def test_students_t_is_that_of_the_tables(dof: int, quantile: float) -> None:
    assert student_t(dof) == pytest.approx(quantile, abs=1e-5)


def test_students_t_has_no_step_between_its_two_methods() -> None:
    assert 0 < student_t(200) - student_t(201) < 1e-4


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_one_test_away(counts: tuple[int, int]) -> None:
    """Each bound p satisfies |share - p| = z * sqrt(p (1 - p) / n), by which Wilson defines the interval."""
    num_solved, n = counts
    share = num_solved / n
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        assert abs(share - bound) == pytest.approx(1.959963985 * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_the_interval_is_over_prompts() -> None:
    """With answers that agree within a prompt, more answers to a prompt must not narrow it."""
    means_P = np.array([0.2, 0.4, 0.6, 0.9, 0.1])
    one = confidence_interval(means_P[:, None])
    many = confidence_interval(np.repeat(means_P[:, None], 64, axis=1))
    assert one is not None and many is not None
    assert many == pytest.approx(one)
    half = 2.776445 * means_P.std(ddof=1) / math.sqrt(5)
    assert one == pytest.approx((means_P.mean() - half, means_P.mean() + half), abs=1e-5)


def test_the_interval_covers_the_truth() -> None:
    """In 95 % of evaluations of 40 prompts of different difficulty with 8 answers each."""
    rng = np.random.default_rng(0)
    num_covered = 0
    for _ in range(400):
        difficulty_P = rng.beta(0.6, 0.6, size=(40, 1))  # its mean is 0.5
        interval = confidence_interval((rng.random((40, 8)) < difficulty_P).astype(float))
        assert interval is not None
        num_covered += interval[0] <= 0.5 <= interval[1]
    assert 0.92 <= num_covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("rewards_PS", "interval"),
    [
        ([[1.0]] * 10, wilson_interval(1.0, 10)),
        ([[1.0, 1.0]] * 10, wilson_interval(1.0, 10)),
        ([[0.0, 1.0]] * 10, wilson_interval(0.5, 10)),
        ([[0.0]], wilson_interval(0.0, 1)),
        ([[0.5]], None),
        ([[0.5, 0.7]], None),
        ([[0.5], [0.5]], (0.5, 0.5)),
    ],
)
def test_intervals_without_variance(
    rewards_PS: list[list[float]], interval: tuple[float, float] | None
) -> None:
    found = confidence_interval(np.array(rewards_PS))
    assert found == (None if interval is None else pytest.approx(interval))


def statistics(rewards_PS: NDArray[np.float64], **changes: Any) -> EvalStatistics:
    none_PS = np.zeros(rewards_PS.shape, bool)
    fields: dict[str, Any] = {
        "tokens_PS": np.full(rewards_PS.shape, 3),
        "is_missing_PS": none_PS,
        "has_failed_PS": none_PS,
        "is_truncated_PS": none_PS,
        "ks": (1,),
        "solved_reward": 1.0,
    }
    return EvalStatistics.of(rewards_PS, **(fields | changes))


def test_failed_samples_count_as_zero_and_unsolved() -> None:
    rewards_PS = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = statistics(
        rewards_PS,
        tokens_PS=np.array([[5, 0, 7, 8], [4, 4, 4, 4]]),
        is_missing_PS=np.array([[False, True, False, False], [False] * 4]),
        has_failed_PS=np.array([[False] * 4, [True, False, False, False]]),
        is_truncated_PS=np.array([[False, False, True, False], [False] * 4]),
        ks=(1, 2, 4),
        solved_reward=0.0,
    )
    # Of the first prompt three answers are solved at threshold 0, of the second as many.
    assert found.pass_at_k == {k: pytest.approx(pass_at_k(4, 3, k)) for k in (1, 2, 4)}
    assert (found.avg, found.num_failed, found.num_tokens) == (0.25, 2, 36)
    assert found.truncated_fraction == pytest.approx(1 / 7) and found.mean_tokens == pytest.approx(36 / 7)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_order_of_prompts_and_answers_is_irrelevant(rewards: list[list[float]], random: Any) -> None:
    shuffled = [random.sample(row, len(row)) for row in random.sample(rewards, len(rewards))]
    first, second = statistics(np.array(rewards), ks=(1, 3)), statistics(np.array(shuffled), ks=(1, 3))
    assert first.avg == pytest.approx(second.avg) and first.pass_at_k == pytest.approx(second.pass_at_k)
    assert first.interval is not None and first.interval == pytest.approx(second.interval)
