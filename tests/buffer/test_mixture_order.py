"""The order of a mixture's prompts, and data that changes, through a ledger on disk."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import BufferConfig
from areal_like.errors import RefusedError
from areal_like.shards import WHOLE, Shard
from areal_like.wire.fingerprint import as_number
from areal_like.wire.messages.hello import Hello, Role
from buffer.ledger.lease_dispatcher import CONTENT
from buffer.ledger.recovery import recover
from buffer.prompts.curriculum import Curriculum
from buffer.prompts.order import PromptOrder, PromptSet
from buffer.service.peers import ConnectedPeers
from buffer.storage.durable import DurableStore
from tests.buffer.test_curriculum_epochs import Play
from tests.buffer.test_registration import scalar, server_hello
from tests.support.buffer_harness import BufferProcess, connected, running_buffer, training
from tests.support.fake_producer import hello
from tests.support.ledger_simulation import ledger_settings, new_ledger
from tests.support.store_load import raising, store_settings
from tests.support.waiting import HANG_LIMIT_S

SOURCES = (
    PromptSet(size=5000, weight=2),
    PromptSet(size=90, weight=1),
    PromptSet(size=1_000_000, weight=0.5),
)
TOTAL = sum(source.size for source in SOURCES)
SHARES = [2 / 3.5, 1 / 3.5, 0.5 / 3.5]


def source_of(index: int) -> int:
    return 0 if index < 5000 else 1 if index < 5090 else 2


def new_order(shard: Shard = WHOLE, curriculum: Curriculum | None = None) -> PromptOrder:
    order = PromptOrder(seed=3, num_prompts=TOTAL, shard=shard, curriculum=curriculum)
    order.sources = SOURCES
    return order


def check_windows(issued: Sequence[int], *, width: int = 1000) -> None:
    """Every window of `width` prompts has the weights to 1 %."""
    counts = Counter(map(source_of, issued[:width]))
    for first in range(len(issued) - width + 1):
        if first:
            counts[source_of(issued[first - 1])] -= 1
            counts[source_of(issued[first + width - 1])] += 1
        for source, share in enumerate(SHARES):
            assert abs(counts[source] / width - share) < 0.01, (first, counts)


def test_each_task_has_epochs_of_its_own() -> None:
    order = new_order()
    issued = [order.next().index for _ in range(8000)]
    small = [index for index in issued if source_of(index) == 1]
    for epoch in range(len(small) // 90):
        assert sorted(small[90 * epoch : 90 * epoch + 90]) == list(range(5000, 5090))
    assert small[:90] != small[90:180], "epochs are shuffled"
    large = [index for index in issued if source_of(index) == 0]
    assert len(set(large)) == len(large) < 5000, "the first epoch is not over"


def test_shards_divide_the_prompts_and_keep_the_weights() -> None:
    orders = [new_order(Shard(index, 3)) for index in range(3)]
    issued = [[order.next().index for _ in range(2000)] for order in orders]
    for shard, own in enumerate(issued):
        assert all(index % 3 == shard for index in own)
        check_windows(own)
    # All shards together, as they issue prompts next to one another.
    check_windows([index for row in zip(*issued, strict=True) for index in row])
    assert {index for own in issued for index in own if source_of(index) == 1} == set(range(5000, 5090))


def test_a_curriculum_keeps_the_weights() -> None:
    order = new_order(curriculum=Curriculum(BufferConfig(curriculum="goldilocks")))
    issued = [order.next().index for _ in range(1500)]
    check_windows(issued)
    resumed = new_order(curriculum=Curriculum(BufferConfig(curriculum="goldilocks")))
    resumed.restore(cursor=700, returned=[])
    assert [resumed.next().index for _ in range(800)] == issued[700:]


def test_a_resumed_ledger_issues_the_same_mixture(tmp_path: Path) -> None:
    def issued_by(directory: Path, *stretches: int) -> list[int]:
        async def play() -> list[int]:
            indices: list[int] = []
            for count in stretches:  # the buffer dies after each
                store = DurableStore(directory, store_settings(), on_error=raising)
                ledger = recover(ledger_settings(durable=True), store, now_s=0.0, dataset=7)
                ledger.state.prompts.set_num_train_prompts(TOTAL, SOURCES)
                ledger.dispatcher.set_content(5)
                indices += [ledger.state.prompts.next().index for _ in range(count)]
                store.close()
            return indices

        return asyncio.run(play())

    whole = issued_by(tmp_path / "whole", 3000)
    check_windows(whole)
    assert issued_by(tmp_path / "parts", 1, 998, 7, 1994) == whole


def test_servers_must_agree_on_the_tasks() -> None:
    ledger = new_ledger()
    known = ledger.state.prompts.order.num_prompts
    for sources in (SOURCES, [PromptSet(size=known, weight=1.0)]):
        with pytest.raises(RefusedError, match=r"source_sizes"):
            ledger.state.prompts.set_num_train_prompts(known, sources)


def peers_with(first: Hello) -> ConnectedPeers:
    peers = ConnectedPeers(job="job", dataset="d")
    peers.check(first)
    peers.expect_model_of(first)
    return peers


def test_a_server_with_other_data_is_refused_by_name() -> None:
    first = hello("rollout-0", content="0123456789abcdef", eval_content="1" * 16)
    peers = peers_with(first)
    peers.check(hello("rollout-1", content=first.content, eval_content=first.eval_content))
    trainer: dict[str, Any] = {"role": Role.TRAINER, "eval_sets": {}}
    peers.check(hello("trainer-0", **trainer))  # it does not know the data
    for name in ("content", "eval_content"):
        same = {"content": first.content, "eval_content": first.eval_content}
        with pytest.raises(RefusedError) as raised:
            peers.check(hello("rollout-1", **(same | {name: "f" * 16})))
        assert raised.value.args[0] == name and "f" * 16 not in raised.value.args[1]


@pytest.mark.parametrize("content", [6, 5])
def test_changed_data_begins_the_order_anew(tmp_path: Path, content: int) -> None:
    async def play() -> tuple[list[int], list[int], int]:
        job = Play(tmp_path, curriculum="goldilocks")
        job.ledger.dispatcher.set_content(5)
        job.steps(40)
        before, job.issued = job.issued, []
        job.close()
        job.open()
        job.ledger.dispatcher.set_content(content)
        evidence = len(job.curriculum.state())
        job.steps(20)
        job.close()
        return before, job.issued, evidence

    before, after, evidence = asyncio.run(play())
    if content == 5:
        assert evidence > 4 and after[:10] != before[:10]
    else:
        assert evidence == 4, "what was heard about other prompts is forgotten"
        assert after[0] == before[0], "the order begins anew"


def test_servers_with_other_data_never_feed_one_job(tmp_path: Path) -> None:
    """A real buffer: its first server decides, until it starts again."""
    ours, theirs = "0123456789abcdef", "f" * 16
    sizes: dict[str, Any] = {"source_sizes": [400, 100], "source_weights": [1.0, 3.0]}

    async def greet(buffer: BufferProcess, name: str, **changes: Any) -> Any:
        async with connected(buffer) as link:
            return await link.call(server_hello(buffer, name, **changes), timeout_s=HANG_LIMIT_S)

    async def first_start(buffer: BufferProcess) -> None:
        assert await greet(buffer, "rollout-0", content=ours, **sizes)
        with pytest.raises(RefusedError, match=r"\(content\)"):
            await greet(buffer, "rollout-1", content=theirs, **sizes)
        with pytest.raises(RefusedError, match=r"\(source_sizes\)"):
            await greet(buffer, "rollout-1", content=ours)
        for wrong in ({"source_sizes": [500]}, {"source_sizes": [1] * 99, "source_weights": [1.0] * 99}):
            with pytest.raises(RefusedError, match=r"\(source_sizes\)"):
                await greet(buffer, "rollout-1", content=ours, **wrong)
        async with training(buffer):
            assert await greet(buffer, "rollout-1", content=ours, **sizes)

    with running_buffer(tmp_path) as buffer:
        asyncio.run(first_start(buffer))
        config = buffer.config
    again = BufferProcess(config)
    try:
        assert asyncio.run(greet(again, "rollout-1", content=theirs, **sizes))
        with pytest.raises(RefusedError, match=r"\(content\)"):
            asyncio.run(greet(again, "rollout-0", content=ours, **sizes))
    finally:
        again.close()
    assert scalar(again, CONTENT) == as_number(theirs)
