"""The order in which reward workers get completions, without workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.tasks.base import Score
from rollout_server.workers import reward_queue
from rollout_server.workers.reward_queue import Item, RewardQueue

HANGS, GOOD = "hangs", "good"


LOOP = asyncio.new_event_loop()
"""Owns the futures; it never runs."""


@pytest.fixture(scope="module", autouse=True)
def closed_loop() -> Iterator[None]:
    yield
    LOOP.close()


def item(number: int, label: str = "", *, num_bytes: int = 1) -> Item:
    done: asyncio.Future[tuple[Score, float]] = LOOP.create_future()
    return Item(number=number, place=f"train {number}", label=label, frame=bytes(num_bytes), done=done)


def queue_of(*labels: str) -> RewardQueue:
    """Items numbered from 0."""
    queue = RewardQueue()
    for number, label in enumerate(labels):
        queue.add(item(number, label))
    return queue


def taken(
    queue: RewardQueue, most: int = 10, *, is_idle: bool = True, is_async: bool = False, room: int = 1
) -> list[int]:
    items = queue.take(most, is_idle=is_idle, is_async=is_async, room_for_suspects=room)
    return [item.number for item in items]


def test_items_are_taken_oldest_first_and_together() -> None:
    queue = queue_of("", "", "", "")
    assert taken(queue, 3) == [0, 1, 2]
    queue.put_back([item(1), item(2)])
    assert taken(queue) == [1, 2, 3] and not len(queue)


def test_large_items_are_sent_in_several_batches() -> None:
    queue = RewardQueue()
    for number in range(3):
        queue.add(item(number, num_bytes=600_000))
    assert [taken(queue), taken(queue), taken(queue)] == [[0], [1], [2]]


def test_an_item_that_may_end_its_worker_is_alone() -> None:
    queue = RewardQueue()
    for number in range(3):
        queue.add(item(number))
    for each in queue.take_all()[1:]:
        each.is_alone = True
        queue.add(each)
    queue.put_back([item(0)])
    assert taken(queue, is_async=True) == [0]
    assert taken(queue, is_idle=False, is_async=True) == []
    assert taken(queue, is_async=True) == [1] and taken(queue, is_async=True) == [2]


def test_scored_items_are_not_sent() -> None:
    queue = queue_of("", "")
    scored = item(2)
    scored.done.cancel()
    queue.put_back([scored])
    assert taken(queue) == [0, 1] and not len(queue)


def test_suspects_come_last_and_each_alone() -> None:
    queue = queue_of(HANGS, HANGS, GOOD, GOOD)
    queue.suspect(HANGS)
    assert taken(queue) == [2, 3]
    assert taken(queue, room=0) == []
    assert taken(queue) == [0] and taken(queue) == [1]


def test_room_for_suspects_of_an_asynchronous_worker() -> None:
    queue = queue_of(HANGS, HANGS, HANGS, GOOD)
    queue.suspect(HANGS)
    assert taken(queue, is_async=True, room=2) == [3, 0, 1]
    assert taken(queue, is_async=True, is_idle=False, room=0) == []
    assert taken(queue, is_async=True, is_idle=False, room=5) == [2]


def test_a_label_is_trusted_again_after_probation() -> None:
    queue = queue_of(HANGS, GOOD, HANGS)
    queue.suspect(HANGS)
    for _ in range(reward_queue._PROBATION - 1):
        queue.trust(HANGS)
    queue.suspect(HANGS)  # another one: all of them count again
    for _ in range(reward_queue._PROBATION - 1):
        queue.trust(HANGS)
    assert taken(queue, 1) == [1]
    queue.trust(HANGS)
    assert taken(queue) == [0, 2]


def test_one_label_alone_is_never_delayed() -> None:
    queue = queue_of(HANGS, HANGS)
    queue.suspect(HANGS)
    assert taken(queue, room=0) == [0, 1]
    queue.add(item(2, HANGS))
    queue.add(item(3, GOOD))
    assert taken(queue, room=0) == [3] and taken(queue) == [2]


def test_suspects_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_queue, "_MAX_SUSPECTS", 2)
    queue = queue_of("a", "b", "c", "d")
    for label in "abc":
        queue.suspect(label)
    assert taken(queue) == [0, 3]


@given(st.data())
def test_no_item_is_lost_or_sent_twice(data: st.DataObject) -> None:
    queue, num_items, sent, held = RewardQueue(), 0, list[int](), list[Item]()
    labels = st.sampled_from([HANGS, GOOD, ""])
    for _ in range(data.draw(st.integers(0, 30))):
        match data.draw(st.sampled_from(["add", "take", "put back", "suspect", "trust"])):
            case "add":
                queue.add(item(num_items, data.draw(labels)))
                num_items += 1
            case "take":
                held += queue.take(
                    data.draw(st.integers(1, 4)),
                    is_idle=True,
                    is_async=data.draw(st.booleans()),
                    room_for_suspects=data.draw(st.integers(-1, 2)),
                )
            case "put back" if data.draw(st.booleans()):
                queue.put_back(held)
                held = []
            case "put back":
                sent += [each.number for each in held]
                held = []
            case "suspect":
                queue.suspect(data.draw(labels))
            case "trust":
                queue.trust(data.draw(labels))
    sent += [each.number for each in (*held, *queue.take_all())]
    assert sorted(sent) == list(range(num_items))
