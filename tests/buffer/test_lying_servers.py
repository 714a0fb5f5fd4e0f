"""Rollout servers that send what no honest one sends: rewards, log-probs, times and totals of absurd size."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from areal_like.failures import FailureKind
from areal_like.trajectory import (
    LARGEST_METRIC,
    LARGEST_REWARD,
    LEAST_LOGPROB,
    MAX_SAMPLE_S,
    STEP_ENDS,
    STEP_REWARDS,
    TOKEN_REWARDS,
)
from areal_like.wire.codec import decode, encode
from areal_like.wire.limits import MAX_STAT, bounded_stats, check_lengths
from areal_like.wire.messages.consumer import TrainerHeartbeat
from areal_like.wire.messages.producer import SampleDone
from areal_like.wire.records import Record
from buffer.diagnosis.facts import JobFacts, ServerFacts, WaitLimits
from buffer.diagnosis.rules import causes_of
from buffer.ledger.ledger import Ledger
from buffer.service.peers import ConnectedPeers, Peer
from buffer.tables.server_health import LIES_PER_QUARANTINE
from buffer.tickets import Verdict
from tests.support.fake_producer import hello
from tests.support.ledger_simulation import add_server, beat, deliver, done, new_ledger, trajectory


def sample(**changes: Any) -> Record:
    """The record of sample 0 of ticket 1: three tokens, of which two were sampled."""
    plain = {"turns": ((3, 0.0),)} if "arrays" in changes or "metrics" in changes else {}
    return Record.of(1, 0, dataclasses.replace(trajectory([0, 0]), **(plain | changes)))


OVER = 1.001


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": 1e20},
        {"reward": -OVER * LARGEST_REWARD},
        {"reward_components": {"a": OVER * LARGEST_REWARD}},
        {"turns": ((2, 0.0), (3, 1e300))},
        {"metrics": {"a": -OVER * LARGEST_METRIC}},
        {"arrays": {TOKEN_REWARDS: np.array([0, 0, 1e10], np.float32)}},
        {"arrays": {STEP_ENDS: np.array([3], np.int32), STEP_REWARDS: np.array([1e10], np.float32)}},
        {"logprobs": np.array([0, -1, OVER * LEAST_LOGPROB], np.float32)},
        {"generation_s": OVER * MAX_SAMPLE_S},
        {"reward_s": -1.0},
    ],
)
def test_a_sample_with_an_absurd_number_fails_alone(changes: dict[str, Any]) -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=4)
    leases = {lease.ticket_id: lease for lease in ledger.dispatcher.grant(now_s=0.0)["a"]}
    forged = SampleDone(lease_id=leases[1].lease_id, record=sample(**changes))
    assert deliver(ledger, "a", forged) is Verdict.INVALID
    counters = ledger.state.counters.summary()
    assert (counters["refusals_invalid"], counters["samples_failed"]) == (1, 1)
    assert counters[f"failed_{FailureKind.ENGINE.value}_retry"] == 1
    (again,) = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert (again.ticket_id, again.sample_indices) == (1, [0])
    honest = SampleDone(lease_id=again.lease_id, record=sample(reward=LARGEST_REWARD))
    assert deliver(ledger, "a", honest) is Verdict.ACCEPTED


def test_the_largest_numbers_are_plausible() -> None:
    record = sample(
        reward=-LARGEST_REWARD,
        reward_components={"a": LARGEST_REWARD},
        metrics={"a": LARGEST_METRIC},
        turns=((2, LARGEST_REWARD), (3, 0.0)),
        logprobs=np.array([0, -1, LEAST_LOGPROB], np.float32),
        generation_s=MAX_SAMPLE_S,
    )
    assert record.is_plausible


def test_no_statistic_is_a_reason_to_refuse_a_trainer() -> None:
    stats = {"reward_mean": 1e300, "loss": -math.inf, "mfu": math.nan, "huge": 10**30, "lag_mean": 0.5}
    bounded = bounded_stats(stats)
    assert bounded == {"reward_mean": MAX_STAT, "loss": -MAX_STAT, "huge": MAX_STAT, "lag_mean": 0.5}
    beat = TrainerHeartbeat(state="training", step=3, stats=bounded)
    assert decode(encode(beat)) == (beat, 0)
    check_lengths(dataclasses.replace(beat, stats={"reward_mean": 1e300}))  # a trainer of the release before


def registered(
    peers: ConnectedPeers, name: str, *, now_s: float = 0.0, is_new: bool = False, incarnation: int = 1
) -> Peer:
    process = dataclasses.replace(hello(name), incarnation=incarnation)
    return peers.add(name.encode(), process, now_s=now_s, is_new=is_new)


def test_a_total_that_cannot_be_true_is_left_out_of_the_sums() -> None:
    peers = ConnectedPeers(job="job", dataset="d")
    honest, liar = registered(peers, "rollout-0"), registered(peers, "rollout-9")
    assert peers.take_stats(honest, {"tokens_generated": 5e9, "idle_s": 864_000.0}, now_s=10.0) == ""
    lies = {"tokens_generated": 1e17, "busy_s": -1.0, "running": 1e300}
    for now_s in (10.0, 11.0):
        assert peers.take_stats(liar, lies, now_s=now_s) == "tokens_generated 1e+17, busy_s -1"
    assert (peers.total("tokens_generated"), peers.total("busy_s")) == (5e9, 0.0)
    peers.remove("rollout-9")
    assert peers.total("tokens_generated") == 5e9
    assert json.loads(json.dumps(liar.stats)) == {"running": MAX_STAT}


def test_a_heartbeat_adds_only_possible_work() -> None:
    """What a server cannot have done since its previous claim is left out, whatever came before."""
    peers = ConnectedPeers(job="job", dataset="d")
    server = registered(peers, "rollout-0", is_new=True)
    claims = [  # of the process: at, its total, whether it is absurd, what is counted
        (1.0, 1e9, True, 0.0),
        (2.0, 1e9 + 5e5, False, 5e5),
        (3.0, 8e10, True, 5e5),
        (3600.0, 8e10 + 3e9, False, 5e5 + 3e9),  # after an hour in which none arrived
        (3601.0, 8.6e10, True, 5e5 + 3e9),
        (3602.0, 0.0, False, 5e5 + 3e9),
        (3603.0, 3.0, False, 5e5 + 3e9 + 3),
    ]
    for now_s, claim, is_absurd, counted in claims:
        peers.remove("rollout-0")
        server = registered(peers, "rollout-0", now_s=now_s)
        assert bool(peers.take_stats(server, {"tokens_generated": claim}, now_s=now_s)) is is_absurd, claim
        assert peers.total("tokens_generated") == server.stats.get("tokens_generated", 0.0) == counted
    most = 0.0
    for beat_number in range(1000):  # more heartbeats do not add more
        most += 5e7
        peers.take_stats(server, {"tokens_generated": most}, now_s=3603.0 + beat_number / 100)
    assert peers.total("tokens_generated") < 4e9


def test_a_restarted_buffer_counts_what_a_server_did_before() -> None:
    peers = ConnectedPeers(job="job", dataset="d")
    server = registered(peers, "rollout-0")
    assert peers.take_stats(server, {"tokens_generated": 8e10}, now_s=1.0) == ""
    assert peers.total("tokens_generated") == 8e10
    successor = registered(peers, "rollout-0", now_s=2.0, is_new=True, incarnation=2)
    assert peers.take_stats(successor, {"tokens_generated": 7.0}, now_s=3.0) == ""
    assert peers.total("tokens_generated") == 8e10 + 7


def lie(ledger: Ledger, *, times: int, now_s: float) -> None:
    beat(ledger, "liar", capacity=8, now_s=now_s)
    for _ in range(times):
        ledger.failed_samples.lied("liar", "x")


def test_lies_slow_a_server_down_until_it_is_refused() -> None:
    """Others make its samples, and its good ones do not make up for the lies."""
    ledger, now_s = new_ledger(max_staleness=9, num_steps=10), 0.0
    add_server(ledger, "liar", capacity=8)
    (first, *_) = ledger.dispatcher.grant(now_s=0.0)["liar"]
    lie(ledger, times=LIES_PER_QUARANTINE - 1, now_s=0.0)
    assert ledger.servers["liar"].health.quarantine is None
    assert deliver(ledger, "liar", done(first, 0, [0])) is Verdict.ACCEPTED
    lie(ledger, times=1, now_s=0.0)
    assert not ledger.servers["liar"].leases and ledger.state.leases.take_aborts()["liar"]
    add_server(ledger, "honest", capacity=8)
    assert first.ticket_id in [lease.ticket_id for lease in ledger.dispatcher.grant(now_s=0.0)["honest"]]
    assert "liar gets no leases: it has sent 16 messages" in " ".join(ledger.take_notices())
    waits = []
    while not ledger.servers["liar"].health.is_refused:
        quarantine = ledger.servers["liar"].health.quarantine
        assert quarantine is not None
        waits.append(quarantine.until_s - now_s)
        now_s = quarantine.until_s + 1
        beat(ledger, "honest", capacity=8, now_s=now_s)
        beat(ledger, "liar", capacity=8, now_s=now_s)
        assert "liar" in ledger.dispatcher.grant(now_s=now_s) or not ledger.servers["liar"].free_samples
        lie(ledger, times=LIES_PER_QUARANTINE, now_s=now_s)
    assert waits == [30.0 * 2**each for each in range(7)]
    quarantine = ledger.servers["liar"].health.quarantine
    assert quarantine is not None and quarantine.until_s > 1e8 and "refused for good" in quarantine.reason
    assert not ledger.state.failure_reason


def test_absurd_samples_are_lies_and_why_names_their_server() -> None:
    ledger = new_ledger(max_staleness=9, num_steps=20, groups_per_step=4, max_consecutive_failures=100)
    add_server(ledger, "liar", capacity=100)
    for lease in ledger.dispatcher.grant(now_s=0.0)["liar"][:LIES_PER_QUARANTINE]:
        ledger.intake.samples_done("liar", [done(lease, 0, [0], reward=1e20)])
    quarantine = ledger.servers["liar"].health.quarantine
    assert quarantine is not None and quarantine.is_for_lies and "reward is 1e+20" in quarantine.reason
    server = ServerFacts(name="liar", silent_s=0.0, state="serving", lies=quarantine.reason)
    limits = WaitLimits.of(heartbeat_s=1.0)
    (cause,) = causes_of(JobFacts(servers=(server,)), slow={}, late=(), limits=limits)
    assert cause.name == "liar" and "1e+20" in cause.what and "keys revoke" in cause.remedy


def test_a_server_may_run_for_years() -> None:
    peers = ConnectedPeers(job="job", dataset="d")
    server, year_s = registered(peers, "rollout-0"), 31_536_000.0
    tokens = 200_000 * year_s
    assert peers.take_stats(server, {"tokens_generated": tokens, "busy_s": 8 * year_s}, now_s=year_s) == ""
    assert peers.total("tokens_generated") == tokens
