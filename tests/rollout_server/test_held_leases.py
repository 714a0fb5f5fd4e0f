"""Held leases as a state machine: the credit is right, and each result is kept until it is acknowledged."""

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.producer import Lease, Purpose, SampleAck, SampleDone, SampleFailed
from areal_like.wire.records import Record
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

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def resend(self, seconds: float) -> None:
        self.now_s += seconds
        due = {key for key, sent_s in self.unacknowledged.items() if sent_s <= self.now_s - 3.0}
        again = self.leases.to_resend(now_s=self.now_s, older_than_s=3.0)
        assert {(result.lease_id, result.sample_index) for result in again} == due and len(again) == len(due)
        self.unacknowledged |= dict.fromkeys(due, self.now_s)

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
