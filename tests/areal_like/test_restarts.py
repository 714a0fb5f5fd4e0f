"""The policy of restarts with simulated time: against the list of everything that has happened."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from areal_like.runtime.restarts import RestartLimits, Restarts, RestartState

SECONDS = st.floats(min_value=0.0, max_value=100.0)


class AnyRestarts(RuleBasedStateMachine):
    """Starts, failures, orderly ends and progress in any order, at any times.

    `failures`: (time, seconds of that life) of each failure since the last progress, the newest last.
    """

    @initialize(
        max_failures=st.integers(0, 5),
        healthy_s=st.sampled_from([0.0, 30.0, math.inf]),
        longest_pause_s=st.sampled_from([0.5, 4.0, 1e9]),
    )
    def begin(self, max_failures: int, healthy_s: float, longest_pause_s: float) -> None:
        self.limits = RestartLimits(
            max_failures=max_failures,
            healthy_s=healthy_s,
            first_pause_s=0.5,
            longest_pause_s=longest_pause_s,
        )
        self.now_s, self.started_s = 1000.0, 1000.0
        self.failures: list[tuple[float, float]] = []
        self.restarts = Restarts(self.limits, now_s=self.now_s)
        assert self.restarts.is_due(now_s=self.now_s), "the first start is due at once"

    def in_a_row(self) -> int:
        """Failures after the last one that ended a long life, that one included."""
        long = [index for index, (_, life_s) in enumerate(self.failures) if life_s >= self.limits.healthy_s]
        return len(self.failures) - (long[-1] if long else 0)

    @rule(seconds=SECONDS)
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.restarts.state is RestartState.WAITING)
    @rule()
    def start(self) -> None:
        self.now_s = max(self.now_s, self.restarts.due_s)
        assert self.restarts.is_due(now_s=self.now_s)
        self.started_s = self.now_s
        self.restarts.started(now_s=self.now_s)

    @precondition(lambda self: self.restarts.state is RestartState.RUNNING)
    @rule()
    def fail(self) -> None:
        self.failures.append((self.now_s, self.now_s - self.started_s))
        self.restarts.failed(now_s=self.now_s)
        if self.restarts.state is RestartState.WAITING:
            pause_s = self.restarts.due_s - self.now_s
            doubled_s = 0.5 * 2 ** (self.in_a_row() - 1)
            assert pause_s == pytest.approx(min(self.limits.longest_pause_s, doubled_s))

    @precondition(lambda self: self.restarts.state is RestartState.RUNNING)
    @rule(pause_s=SECONDS)
    def leave(self, pause_s: float) -> None:
        self.restarts.left(now_s=self.now_s, pause_s=pause_s)
        assert self.restarts.due_s == self.now_s + pause_s

    @precondition(lambda self: self.restarts.state is not RestartState.GIVEN_UP)
    @rule(late_s=SECONDS)
    def advance(self, late_s: float) -> None:
        """Progress is seen `late_s` after it was made; a failure may lie between."""
        at_s = self.now_s - late_s
        self.failures = self.failures[-1:] if self.failures and self.failures[-1][0] >= at_s else []
        self.restarts.made_progress(at_s=at_s)

    @invariant()
    def the_count_is_that_of_the_list(self) -> None:
        restarts = self.restarts
        assert restarts.num_failures == (self.in_a_row() if self.failures else 0)
        is_given_up = restarts.state is RestartState.GIVEN_UP
        assert is_given_up == (restarts.num_failures > self.limits.max_failures)
        is_due = restarts.is_due(now_s=self.now_s)
        assert is_due == (restarts.state is RestartState.WAITING and self.now_s >= restarts.due_s)


AnyRestarts.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_restarts = AnyRestarts.TestCase


def pauses_until_given_up(limits: RestartLimits) -> list[float]:
    """The pauses after the failures of a process that fails at once after each start."""
    restarts, now_s, pauses = Restarts(limits, now_s=0.0), 0.0, []
    while True:
        restarts.started(now_s=now_s)
        restarts.failed(now_s=now_s)
        if restarts.state is RestartState.GIVEN_UP:
            return pauses
        pauses.append(restarts.due_s - now_s)
        now_s = restarts.due_s


def test_pauses_double_up_to_a_limit() -> None:
    limits = RestartLimits(max_failures=4, first_pause_s=1.0, longest_pause_s=4.0)
    assert pauses_until_given_up(limits) == [1.0, 2.0, 4.0, 4.0]
    endless = RestartLimits(max_failures=5000, first_pause_s=1e-9, longest_pause_s=1e-8)
    assert len(pauses_until_given_up(endless)) == 5000, "no power of two is too large for a float"


def test_the_limits_of_daemons_are_as_documented() -> None:
    """docs/reference/failures.md: three times in a row, a life of 30 s resets the count."""
    assert pauses_until_given_up(RestartLimits()) == [0.5, 1.0, 2.0]
    assert RestartLimits().healthy_s == 30.0
