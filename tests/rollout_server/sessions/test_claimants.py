"""Agents whose sessions fail again and again are slowed down, and in the end refused; others are not."""

from __future__ import annotations

import itertools

import pytest

from areal_like.wire.limits import MAX_WAIT_CHARS
from rollout_server.sessions.claimants import (
    LONGEST_WAIT_S,
    MAX_REMEMBERED,
    NUM_FREE,
    NUM_REFUSED,
    REFUSED_S,
    Claimant,
    Claimants,
)

BROKEN = Claimant(address="10.0.0.1", token="t", name="broken")
OTHER = Claimant(address="10.0.0.1", token="t", name="other")
ELSEWHERE = Claimant(address="10.0.0.2", token="t", name="broken")
NAMELESS = Claimant(address="10.0.0.1")


def claims(claimants: Claimants, who: Claimant, *, until_s: float, now_s: float = 0.0) -> list[float]:
    """Times at which an agent that fails each session at once gets one, if it claims whenever it may."""
    times = []
    while now_s < until_s:
        hold = claimants.hold(who, now_s=now_s)
        if hold is None:
            claimants.fail(who, "no request", claimed_s=now_s, now_s=now_s)
            times.append(now_s)
        else:
            now_s += hold.wait_s
    return times


@pytest.mark.parametrize("who", [BROKEN, NAMELESS])
def test_who_fails_gets_fewer_sessions(who: Claimant) -> None:
    claimants = Claimants()
    times = claims(claimants, who, until_s=3600.0)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[: NUM_FREE + 3] == [0.0] * NUM_FREE + [1.0, 2.0, 4.0]
    assert all(wait <= LONGEST_WAIT_S for wait in waits[: NUM_REFUSED - 1])
    if who is BROKEN:
        assert len(times) <= NUM_REFUSED + 3600 // REFUSED_S
        hold = claimants.hold(who, now_s=times[-1] + 1)
        assert hold is not None and hold.is_refused and "the last: no request" in hold.reason
        assert claimants.num_refused and claimants.num_slowed
    else:  # all without a name are one: it may be a healthy one
        assert len(times) < 75 and not claimants.num_refused
    assert claimants.num_failures == len(times)


def test_healthy_agents_of_the_same_machine_go_on() -> None:
    claimants = Claimants()
    claimants.deliver(OTHER)
    last_s = claims(claimants, BROKEN, until_s=1000.0)[-1]
    for who in (OTHER, ELSEWHERE):
        assert claimants.hold(who, now_s=last_s) is None
    newcomer = Claimant(address="10.0.0.1", token="t", name="new")
    hold = claimants.hold(newcomer, now_s=last_s)
    assert hold is not None and not hold.is_refused and hold.wait_s <= LONGEST_WAIT_S
    assert claimants.hold(newcomer, now_s=last_s + hold.wait_s) is None
    claimants.deliver(newcomer)
    last_s = claims(claimants, BROKEN, now_s=2000.0, until_s=2001.0)[-1]
    assert claimants.hold(newcomer, now_s=last_s) is None


def test_new_names_do_not_help() -> None:
    claimants, now_s = Claimants(), 0.0
    for number in range(1000):
        who = Claimant(address="10.0.0.1", token=str(number), name=str(number))
        while (hold := claimants.hold(who, now_s=now_s)) is not None:
            assert not hold.is_refused
            now_s += hold.wait_s
        claimants.fail(who, "no request", claimed_s=now_s, now_s=now_s)
    assert now_s > 980 * LONGEST_WAIT_S


def test_a_good_sample_ends_it() -> None:
    claimants = Claimants()
    claims(claimants, BROKEN, until_s=100.0)
    claimants.deliver(BROKEN)
    assert claimants.hold(BROKEN, now_s=100.0) is None and claimants.troubles(now_s=100.0) == {}


def test_a_failing_agent_is_named_once_with_its_whole_error() -> None:
    claimants, error = Claimants(), "x" * 300
    who = Claimant(address="2001:0db8:85a3:0000:0000:8a2e:0370:7334", token="t", name="n" * 100)
    for now_s in range(2 * NUM_FREE):
        claimants.fail(who, error, claimed_s=now_s, now_s=now_s)
    (trouble,) = claimants.troubles(now_s=10.0)
    assert error in trouble and "nnn" in trouble and len(f"sessions: {trouble}") <= MAX_WAIT_CHARS


def test_agents_with_new_names_are_named_by_address() -> None:
    claimants = Claimants()
    for number in range(2 * NUM_FREE):
        who = Claimant(address="10.0.0.1", token="t", name=str(number))
        claimants.fail(who, "no request", claimed_s=number, now_s=number)
    assert list(claimants.troubles(now_s=10.0)) == ["the last 6 sessions of 10.0.0.1 failed: no request"]


def test_the_end_of_a_machine_counts_once() -> None:
    claimants = Claimants()
    claimants.deliver(BROKEN)
    of_sample = [claimants.fail(BROKEN, "gone", claimed_s=at / 100, now_s=5 + at / 100) for at in range(100)]
    assert of_sample == [True] + [False] * 99, "one cause"
    assert claimants.hold(BROKEN, now_s=7.0) is None


def test_little_is_remembered() -> None:
    claimants = Claimants()
    claims(claimants, BROKEN, until_s=100.0)
    for number in range(2 * MAX_REMEMBERED):
        claimants.deliver(Claimant(address=str(number)))
    assert len(claimants._records) <= MAX_REMEMBERED
    for number in range(100):
        claims(claimants, Claimant(address=f"broken {number}"), until_s=10.0)
    assert 0 < len(claimants.troubles(now_s=10.0)) < 10
