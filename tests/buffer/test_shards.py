"""A job split over several buffers: the arithmetic, the ledgers, and the trainer's client."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, RefusedError
from areal_like.shards import WHOLE, Shard, all_shards
from areal_like.wire.messages.consumer import (
    AdoptVersion,
    AllocVersion,
    CommitStep,
    Fetch,
    GetRunCounters,
    GetStreamState,
    RequestEval,
    RunCounters,
    StartTraining,
    StreamState,
    VersionGranted,
)
from areal_like.wire.messages.hello import Hello, Ok, Role, Welcome
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.prompts.order import PromptOrder
from buffer.service.peers import ConnectedPeers
from buffer.settings import LedgerSettings
from tests.support.ledger_simulation import add_server, beat, deliver, done
from tests.support.row_store import RowStore
from trainer.buffer_client.shards import call_shards, merge_streams, split_stream

counts = st.integers(1, 9)


@given(count=counts, total=st.integers(0, 500))
def test_shards_share_everything_evenly_and_without_overlap(count: int, total: int) -> None:
    owned = [[number for number in range(total) if shard.owns(number)] for shard in all_shards(count)]
    assert sorted(number for numbers in owned for number in numbers) == list(range(total))
    assert [len(numbers) for numbers in owned] == [shard.share(total) for shard in all_shards(count)]
    assert all(before - after in (0, 1) for before, after in pairwise(map(len, owned))), (
        "the first shards have one more"
    )
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(count=counts, number=st.integers(0, 1 << 62))
def test_every_number_belongs_to_one_shard(count: int, number: int) -> None:
    shard = Shard.of(number, count=count)
    assert shard.owns(number) and shard.number(shard.local(number)) == number
    assert not any(other.owns(number) for other in all_shards(count) if other != shard)
    assert count > 1 or shard.local(number) == number


@given(count=counts, num_positions=st.integers(1, 60))
def test_positions_interleave_the_shards(count: int, num_positions: int) -> None:
    positions = [
        (shard.local(p), shard.index) for p in range(num_positions) for shard in [Shard.of(p, count=count)]
    ]
    assert positions == sorted(
        (local, shard.index) for shard in all_shards(count) for local in range(shard.share(num_positions))
    )


@given(count=counts, num_prompts=st.integers(1, 80), seed=st.integers(0, 99))
def test_every_epoch_of_a_shard_has_only_its_prompts(count: int, num_prompts: int, seed: int) -> None:
    for shard in all_shards(count):
        own = shard.share(num_prompts)
        order = PromptOrder(seed=seed, num_prompts=num_prompts, shard=shard)
        for _ in range(2):
            assert sorted(order.next().index for _ in range(own)) == [
                index for index in range(num_prompts) if shard.owns(index)
            ]


def test_the_name_of_a_daemon_selects_its_shard() -> None:
    assert Shard.named("anything", count=1) == WHOLE and WHOLE.name == "buffer" and WHOLE.ledger == "ledger"
    assert [Shard.named(f"buffer-{index}", count=3) for index in range(3)] == all_shards(3)
    assert [shard.ledger for shard in all_shards(2)] == ["ledger-0", "ledger-1"]
    for wrong in ("buffer", "buffer-3", "buffer-x"):
        with pytest.raises(ConfigError, match="--name buffer-0 or buffer-1 or buffer-2"):
            Shard.named(wrong, count=3)


def test_settings_that_leave_a_shard_without_work_are_refused() -> None:
    for wrong, message in (
        ({"buffer": {"num_shards": 3}, "trainer": {"groups_per_step": 2}}, "groups_per_step=2 groups"),
        ({"buffer": {"num_shards": 3}, "rollout": {"max_running": 2, "queue_samples": 0}}, "max_running"),
        ({"buffer": {"num_shards": 2, "ports": [5555]}}, "2 different ports"),
        ({"buffer": {"num_shards": 2, "ports": [5555, 5555]}}, "2 different ports"),
        ({"buffer": {"num_shards": 2, "port": 65535}}, r"0\.\.65534"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping(wrong)


def test_a_peer_with_another_number_of_shards_is_refused() -> None:
    fields: dict[str, Any] = {
        "job": "job",
        "model": "m",
        "tokenizer": "t",
        "dataset": "d",
        "http_address": "",
        "process": "0" * 32,
    }
    peers = ConnectedPeers(job="job", dataset="d", shard=Shard(1, 2))
    for shard, count, field in ((0, 2, "shard"), (1, 3, "num_shards"), (0, 1, "num_shards")):
        hello = Hello(role=Role.TRAINER, name="trainer-0", shard=shard, num_shards=count, **fields)
        with pytest.raises(RefusedError) as refused:
            peers.check(hello)
        assert refused.value.args[0] == field


def test_a_returning_server_is_counted_once() -> None:
    peers = ConnectedPeers(job="job", dataset="d")
    fields: dict[str, Any] = {
        "role": Role.ROLLOUT,
        "job": "job",
        "model": "m",
        "tokenizer": "t",
        "dataset": "d",
        "http_address": "",
        "process": "0" * 32,
    }
    for incarnation, tokens, total in ((1, 10.0, 10.0), (1, 12.0, 12.0), (2, 5.0, 17.0)):
        peer = peers.add(b"route", Hello(name="rollout-0", incarnation=incarnation, **fields), now_s=0.0)
        peer.stats = {"tokens_generated": tokens}
        peers.remove("rollout-0")
        assert peers.total("tokens_generated") == total


# --- ledgers ---


def shard_ledger(shard: Shard, store: RowStore | None = None) -> Ledger:
    """A shard of a job with 5 groups per step and 10 prompts."""
    config = {
        "max_staleness": 1,
        "trainer": {"groups_per_step": 5, "num_steps": 4},
        "sampling": {"group_size": 1},
    }
    return recover(LedgerSettings.from_config(from_mapping(config), shard), store or RowStore(), now_s=0.0)


def begin(ledger: Ledger) -> Ledger:
    """Adds a trainer and a server."""
    ledger.state.prompts.set_num_train_prompts(10)
    ledger.trainer.start_training(incarnation=1, step=0, stream={})
    add_server(ledger, "rollout-0", capacity=32)
    return ledger


def generate(ledger: Ledger, *, version: int = 0) -> list[int]:
    """Generates everything that is leased now; returns the lease ids."""
    leases = [lease for granted in ledger.dispatcher.grant(now_s=0.0).values() for lease in granted]
    for lease in leases:
        assert not deliver(ledger, "rollout-0", done(lease, 0, [version])).refusal
    return [lease.lease_id for lease in leases]


def test_two_shards_number_tickets_and_positions_apart() -> None:
    ledgers = [begin(shard_ledger(shard)) for shard in all_shards(2)]
    leases = [generate(ledger) for ledger in ledgers]
    assert [len(ids) for ids in leases] == [6, 4], "two steps' shares: lag 0 and 1"
    assert not set(leases[0]) & set(leases[1])
    groups = [ledgers[position % 2].trainer.fetch(step=0, position=position) for position in range(5)]
    assert [group.position for group in groups if group] == list(range(5))
    tickets = [group.ticket_id for group in groups if group]
    assert len(set(tickets)) == 5 and [ticket % 2 for ticket in tickets] == [0, 1, 0, 1, 0]
    with pytest.raises(RefusedError, match="position"):
        ledgers[0].trainer.fetch(step=0, position=1)
    with pytest.raises(RefusedError, match="position"):
        ledgers[1].trainer.fetch(step=0, position=5)


def test_adopting_a_version_is_idempotent_and_admits_work() -> None:
    first, second = (begin(shard_ledger(shard)) for shard in all_shards(2))
    for ledger in (first, second):
        generate(ledger)
        ledger.trainer.complete_step(incarnation=1, step=0)
    version = first.trainer.alloc_version(incarnation=1, step=1)
    with pytest.raises(RefusedError, match="shard"):
        second.trainer.alloc_version(incarnation=1, step=1)
    beat(second, "rollout-0", capacity=32, version=version)
    assert not generate(second, version=version), "the version is not adopted yet"
    for _ in range(2):
        second.trainer.adopt_version(incarnation=1, version=version, step=1)
    assert len(generate(second, version=version)) == 2
    with pytest.raises(RefusedError, match="version"):
        second.trainer.adopt_version(incarnation=1, version=version, step=0)


def test_no_trainer_can_use_up_the_version_numbers() -> None:
    """After 2^63 - 1 the ledger could store no further version: the run would have ended for good."""
    first, second = (begin(shard_ledger(shard)) for shard in all_shards(2))
    with pytest.raises(RefusedError, match="shard"):
        first.trainer.adopt_version(incarnation=1, version=7, step=0)
    with pytest.raises(RefusedError, match="version"):
        second.trainer.adopt_version(incarnation=1, version=2**63 - 1, step=0)
    second.trainer.adopt_version(incarnation=1, version=7, step=0)
    with pytest.raises(RefusedError, match="stream"):
        shard_ledger(WHOLE).trainer.start_training(incarnation=1, step=0, stream={"next_version": 2**63 - 1})
    assert first.trainer.alloc_version(incarnation=1, step=0) < 7


def test_a_ledger_of_another_shard_is_refused() -> None:
    store = RowStore()
    before = begin(shard_ledger(Shard(1, 2), store))
    generate(before)
    again = shard_ledger(Shard(1, 2), store.copy())
    assert (
        again.state.tickets.num_issued == 4
        and again.state.tickets.has_issued(3)
        and not again.state.tickets.has_issued(2)
    )
    again.state.prompts.set_num_train_prompts(10)
    again.trainer.complete_step(incarnation=1, step=0)
    again.trainer.adopt_version(incarnation=1, version=1, step=1)
    add_server(again, "rollout-0", capacity=32, version=1)
    assert [lease_id % 2 for lease_id in generate(again, version=1)] == [1, 1]
    assert sorted(again.state.tickets.live)[-2:] == [11, 13]
    for other in (Shard(0, 2), Shard(1, 3), WHOLE):
        with pytest.raises(ConfigError, match=r"shard 1 with buffer\.num_shards=2"):
            shard_ledger(other, store.copy())


def test_poison_in_one_shard_resets_attempts_in_all() -> None:
    first, second = (begin(shard_ledger(shard)) for shard in all_shards(2))
    for incarnation in (1, 2, 3):
        for ledger in (first, second):
            ledger.trainer.start_training(incarnation=incarnation, step=0, stream={})
            generate(ledger)
        for position in range(5):
            (first, second)[position % 2].trainer.fetch(step=0, position=position)
    for ledger in (first, second):
        with pytest.raises(RefusedError, match="attempts"):
            ledger.trainer.start_training(incarnation=4, step=0, stream={})
    dropped = second.trainer.fetch(step=0, position=1)
    assert dropped is not None
    for ledger in (first, second):
        ledger.operator.poison([dropped.ticket_id])
        ledger.trainer.start_training(incarnation=5, step=0, stream={})
    assert second.trainer.fetch(step=0, position=1) != dropped


# --- the trainer's side ---


class FakeShard:
    """A shard that records requests and answers from a table."""

    def __init__(self, answers: dict[type, Any]) -> None:
        self.requests: list[Any] = []
        self._answers = answers

    async def __call__(self, message: Any) -> Any:
        self.requests.append(message)
        answer = self._answers.get(type(message), Ok())
        if isinstance(answer, Exception):
            raise answer
        return answer


def ask(message: Any, *shards: FakeShard) -> Any:
    """The job's answer."""
    return asyncio.run(call_shards(message, shards))


def test_each_request_goes_to_the_right_shards() -> None:
    shards = [FakeShard({AllocVersion: VersionGranted(version=7)}) for _ in range(3)]
    assert ask(AllocVersion(step=2), *shards) == VersionGranted(version=7)
    ask(Fetch(step=1, position=4), *shards)
    ask(CommitStep(step=1), *shards)
    ask(RequestEval(eval_id=0, num_prompts=1, min_version=0), *shards)
    adopt = AdoptVersion(version=7, step=2)
    assert [[type(message).__name__ for message in shard.requests] for shard in shards] == [
        ["AllocVersion", "CommitStep", "RequestEval"],
        ["AdoptVersion", "Fetch", "CommitStep"],
        ["AdoptVersion", "CommitStep"],
    ]
    assert adopt in shards[1].requests and adopt in shards[2].requests


def test_refusals_of_several_shards_are_joined() -> None:
    shards = [FakeShard({StartTraining: RefusedError(f"tickets {index}")}) for index in range(2)]
    with pytest.raises(RefusedError, match="tickets 0; tickets 1"):
        ask(StartTraining(step=0), *shards)


def test_a_checkpoint_keeps_the_stream_state_of_every_shard() -> None:
    streams: list[dict[str, int | list[int]]] = [
        {"cursor": 4, "pending": [1, 2]},
        {"cursor": 5, "pending": []},
    ]
    state = ask(
        GetStreamState(step=0),
        *(FakeShard({GetStreamState: StreamState(stream=stream)}) for stream in streams),
    )
    shards = [
        FakeShard({StartTraining: Welcome(job="j", incarnation=1, step=1, newest_version=index)})
        for index in range(2)
    ]
    assert ask(StartTraining(step=1, stream=state.stream), *shards).newest_version == 0
    assert [shard.requests[0].stream for shard in shards] == streams
    assert split_stream({}, num_shards=2) == [{}, {}]
    assert split_stream(merge_streams(streams[:1]), num_shards=1) == streams[:1]
    for stream, count in ((state.stream, 1), (state.stream, 3), (streams[0], 2)):
        with pytest.raises(RefusedError, match="set that again"):
            split_stream(stream, num_shards=count)


def test_run_counters_of_shards_are_summed_and_averaged() -> None:
    def counters_of(trained: int, lag: float, generated: float) -> RunCounters:
        counters = dict.fromkeys(
            ("generation_busy_s", "generation_idle_s", "samples_dropped", "mean_dropped_sample_tokens"), 0.0
        )
        counters |= {
            "samples_trained": trained,
            "tokens_trained": 10.0 * trained,
            "tokens_generated": generated,
            "max_trained_lag": lag,
        }
        counters |= {
            "mean_trained_lag": lag,
            "mean_trained_token_lag": lag,
            "mean_trained_sample_tokens": 10.0,
        }
        return RunCounters(tickets={"issued": trained}, drops={"stale": 1}, counters=counters)

    merged = ask(
        GetRunCounters(),
        *(
            FakeShard({GetRunCounters: one})
            for one in (counters_of(30, 1.0, 900.0), counters_of(10, 3.0, 880.0))
        ),
    )
    assert merged.tickets == {"issued": 40} and merged.drops == {"stale": 2}
    counters = merged.counters
    assert (
        counters["mean_trained_lag"] == 1.5
        and counters["max_trained_lag"] == 3.0
        and counters["tokens_generated"] == 900.0
    )
    assert counters["mean_trained_sample_tokens"] == 10.0 and counters["mean_dropped_sample_tokens"] == 0.0
