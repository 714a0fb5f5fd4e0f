"""Held leases as a state machine: the credit is right, and each result is kept until it is acknowledged."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.producer import Lease, Purpose, SampleAck, SampleDone, SampleFailed
from areal_like.wire.records import Record
from areal_like.wire.routes import Routes
from rollout_server.leases.held_leases import HeldLeases, Place

AT_ENGINE, EPISODES = 9, 14


def trajectory() -> Trajectory:
    return Trajectory(
        tokens=np.array([1, 2], np.int32),
        loss_mask=np.array([0, 1], np.uint8),
        logprobs=np.array([0, -1], np.float32),
        versions=np.array([-1, 0], np.int32),
        reward=1.0,
        finish_reason=FinishReason.STOP,
    )


class HeldLeasesMachine(RuleBasedStateMachine):
    """Compares HeldLeases with a simple model: sets of missing samples and of unacknowledged results."""

    def __init__(self) -> None:
        super().__init__()
        self.leases = HeldLeases(engine_samples=AT_ENGINE, max_episodes=EPISODES)
        self.missing: dict[tuple[int, int], Place] = {}
        self.unacknowledged: dict[tuple[int, int], float] = {}
        self.now_s = 0.0

    @rule(lease_id=st.integers(1, 6), samples=st.sets(st.integers(0, 3)))
    def grant(self, lease_id: int, samples: set[int]) -> None:
        known = any(lease_id == held for held, _ in self.missing.keys() | self.unacknowledged.keys())
        lease = Lease(
            lease_id=lease_id,
            ticket_id=lease_id,
            prompt_index=0,
            purpose=Purpose.TRAIN,
            sample_indices=sorted(samples),
            seed=0,
        )
        assert self.leases.grant(lease) == (bool(samples) and not known)
        if not known:
            self.missing |= {(lease_id, sample): Place.ENGINE for sample in samples}

    @rule(lease_id=st.integers(1, 6), sample=st.integers(0, 3), place=st.sampled_from(Place))
    def move(self, lease_id: int, sample: int, place: Place) -> None:
        before = self.leases.capacity_samples
        self.leases.moved(lease_id, sample, place)
        if (lease_id, sample) in self.missing:
            self.missing[lease_id, sample] = place
        else:
            assert self.leases.capacity_samples == before

    @rule(lease_id=st.integers(1, 6), sample=st.integers(0, 3), failed=st.booleans())
    def finish(self, lease_id: int, sample: int, failed: bool) -> None:
        named = {"lease_id": lease_id, "ticket_id": lease_id, "sample_index": sample}
        result = (
            SampleFailed(**named, kind=FailureKind.REWARD, num_tokens=0, error="x")
            if failed
            else SampleDone(lease_id=lease_id, record=Record.of(lease_id, sample, trajectory()))
        )
        assert self.leases.finish(result, now_s=self.now_s) == ((lease_id, sample) in self.missing)
        if (lease_id, sample) in self.missing:
            del self.missing[lease_id, sample]
            self.unacknowledged[lease_id, sample] = self.now_s

    @rule(lease_id=st.integers(1, 6), sample=st.integers(0, 3))
    def acknowledge(self, lease_id: int, sample: int) -> None:
        self.leases.acknowledge(SampleAck(lease_id=lease_id, sample_indices=[sample]))
        self.unacknowledged.pop((lease_id, sample), None)

    @rule(lease_ids=st.lists(st.integers(1, 6), unique=True))
    def abort(self, lease_ids: list[int]) -> None:
        held = {lease_id for lease_id, _ in self.missing.keys() | self.unacknowledged.keys()}
        assert set(self.leases.drop([*lease_ids, *lease_ids])) == held & set(lease_ids)
        self.remove(set(lease_ids))

    @rule()
    def give_back(self) -> None:
        unfinished = {lease_id for lease_id, _ in self.missing}
        assert set(self.leases.drop_unfinished()) == unfinished
        self.remove(unfinished)

    @rule(seconds=st.sampled_from([0.5, 3.0, 120.0]), is_new_connection=st.booleans())
    def resend(self, seconds: float, is_new_connection: bool) -> None:
        self.now_s += seconds
        shortest_s = 0.0 if is_new_connection else 3.0
        waited_s = {key: self.now_s - sent_s for key, sent_s in self.unacknowledged.items()}
        results = self.leases.to_resend(now_s=self.now_s, shortest_s=shortest_s)
        again = {(result.lease_id, result.sample_index) for result in results}
        assert len(again) == len(results)
        assert all(waited_s[key] >= shortest_s for key in again)
        assert all(key in again for key in waited_s if is_new_connection or waited_s[key] >= 120)
        self.unacknowledged |= dict.fromkeys(again, self.now_s)

    def remove(self, lease_ids: set[int]) -> None:
        self.missing = {key: place for key, place in self.missing.items() if key[0] not in lease_ids}
        self.unacknowledged = {
            key: sent_s for key, sent_s in self.unacknowledged.items() if key[0] not in lease_ids
        }

    @invariant()
    def adds_up(self) -> None:
        assert self.leases.holding_samples == len(self.missing)
        num_at = Counter(self.missing.values())
        assert +self.leases.num_at == num_at and min(self.leases.num_at.values(), default=0) >= 0
        free = min(AT_ENGINE - num_at[Place.ENGINE], EPISODES - len(self.missing))
        assert self.leases.free_samples == free
        assert self.leases.num_unacknowledged == len(self.unacknowledged)
        assert set(self.leases.lease_ids) == {
            lease_id for lease_id, _ in self.missing.keys() | self.unacknowledged.keys()
        }


TestHeldLeases = HeldLeasesMachine.TestCase
TestHeldLeases.settings = settings(max_examples=60, stateful_step_count=40)


def leases_with(*num_bytes: int) -> tuple[HeldLeases, list[SampleDone]]:
    """Results with routes of so many bytes, of one lease."""
    indices = list(range(len(num_bytes)))
    leases = HeldLeases(engine_samples=AT_ENGINE, max_episodes=EPISODES)
    leases.grant(
        Lease(lease_id=1, ticket_id=1, prompt_index=0, purpose=Purpose.TRAIN, sample_indices=indices, seed=0)
    )
    results = []
    for index, size in zip(indices, num_bytes, strict=True):
        routes = Routes(np.zeros((1, size // 1000, 1000), np.uint8), 8) if size else None
        record = Record.of(1, index, replace(trajectory(), routes=routes))
        results.append(SampleDone(lease_id=1, record=record))
    return leases, results


def resent_at(leases: HeldLeases, *, until_s: int) -> list[int]:
    """The seconds at which something is sent again."""
    return [now_s for now_s in range(1, until_s) if leases.to_resend(now_s=now_s, shortest_s=5.0)]


def test_repetitions_become_rare() -> None:
    leases, (small,) = leases_with(0)
    leases.finish(small, now_s=0.0)
    # A hundred bytes add a little to each wait.
    assert resent_at(leases, until_s=400) == [6, 17, 38, 79, 160, 280]


@pytest.mark.parametrize(("num_sent", "first_s"), [(1, 9), (3, 17)])
def test_large_results_have_time_to_arrive(num_sent: int, first_s: int) -> None:
    """3.9 MB each, and a connection of one MiB a second: not before all that was sent can have arrived."""
    leases, results = leases_with(*[3_900_000] * 3)
    for result in results[:num_sent]:
        leases.finish(result, now_s=0.0)
    last = results[num_sent - 1]
    repeated = [now_s for now_s in range(1, 20) if last in leases.to_resend(now_s=now_s, shortest_s=5.0)]
    assert repeated[0] == first_s
    leases, (huge,) = leases_with(4_000_000)
    leases.finish(huge, now_s=0.0)
    assert leases.to_resend(now_s=1.0, shortest_s=0) == [huge], "a new connection"


def test_a_result_that_was_overtaken_is_lost() -> None:
    leases, (first, second) = leases_with(4_000_000, 4_000_000)
    leases.finish(first, now_s=0.0)
    leases.finish(second, now_s=1.0)
    assert leases.to_resend(now_s=5.0, shortest_s=5.0) == []
    leases.acknowledge(SampleAck(lease_id=1, sample_indices=[1]))
    assert leases.to_resend(now_s=5.0, shortest_s=5.0) == [first]
    assert leases.to_resend(now_s=14.0, shortest_s=5.0) == [], "it is given time again"
