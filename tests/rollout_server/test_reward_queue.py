"""The order in which reward workers get completions, without workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.tasks.base import Score
from rollout_server.workers import reward_queue
from rollout_server.workers.reward_queue import Item, RewardQueue

HANGS, GOOD, OTHER = "hangs", "good", "other"
TIMEOUT_S = 10.0
REMEMBERED_S = TIMEOUT_S / 2 + reward_queue._REMEMBERED_S


LOOP = asyncio.new_event_loop()
"""Owns the futures; it never runs."""


@pytest.fixture(scope="module", autouse=True)
def closed_loop() -> Iterator[None]:
    yield
    LOOP.close()


def item(number: int, part: str = "", *, num_bytes: int = 1, is_alone: bool = False) -> Item:
    done: asyncio.Future[tuple[Score, float]] = LOOP.create_future()
    return Item(
        number=number,
        place=f"train {number}",
        part=part,
        frame=bytes(num_bytes),
        done=done,
        is_alone=is_alone,
    )


def queue_of(*parts: str, now_s: float = 0.0) -> RewardQueue:
    """Items numbered from 0, of parts whose rewards take a millisecond."""
    queue = RewardQueue(timeout_s=TIMEOUT_S)
    for part in ("", HANGS, GOOD, OTHER):
        queue.ended(item(0, part), 0.001)
    for number, part in enumerate(parts):
        queue.add(item(number, part), now_s=now_s)
    return queue


def taken(
    queue: RewardQueue,
    most: int = 10,
    *,
    is_idle: bool = True,
    is_async: bool = False,
    num_slots: int = 2,
    used: Mapping[str, int] | None = None,
    now_s: float = 0.0,
) -> list[int]:
    """`used`: slots in use, by part."""
    items = queue.take(
        most,
        is_idle=is_idle,
        is_async=is_async,
        num_slots=num_slots,
        used=Counter(used or {}),
        now_s=now_s,
    )
    return [item.number for item in items]


def test_items_are_taken_oldest_first_and_together() -> None:
    queue = queue_of(GOOD, OTHER, GOOD, OTHER)
    assert taken(queue, 3) == [0, 1, 2]
    for number in (2, 1):
        queue.add(item(number, GOOD), now_s=0)
    assert taken(queue) == [1, 2, 3] and not len(queue)


def test_large_items_are_sent_in_several_batches() -> None:
    queue = queue_of()
    for number in range(3):
        queue.add(item(number, num_bytes=600_000), now_s=0)
    assert [taken(queue), taken(queue), taken(queue)] == [[0], [1], [2]]


def test_a_batch_takes_as_long_as_its_parts_usually_do() -> None:
    queue = queue_of(GOOD, "slow", GOOD, GOOD, "new", GOOD)
    queue.ended(item(0, "slow"), 1.0)
    assert [taken(queue) for _ in range(5)] == [[0], [1], [2, 3], [4], [5]]
    queue = queue_of(*["slow"] * 3)
    assert taken(queue, is_async=True) == [0, 1, 2]


@pytest.mark.parametrize("part", [HANGS, GOOD])
def test_an_item_that_may_end_its_worker_is_alone(part: str) -> None:
    queue = queue_of()
    queue.suspect([item(9, HANGS)], now_s=0)
    queue.add(item(0, part, is_alone=True), now_s=0)
    queue.add(item(1, GOOD), now_s=0)
    queue.add(item(2, GOOD, is_alone=True), now_s=0)
    assert taken(queue, is_idle=False, is_async=True, num_slots=4) == []
    assert taken(queue, is_async=True, num_slots=4) == [0]
    assert taken(queue, is_async=True, num_slots=4) == [1]
    assert taken(queue, is_async=True, num_slots=4) == [2]


def test_scored_items_are_not_sent() -> None:
    queue = queue_of("", "")
    scored = item(2)
    scored.done.cancel()
    queue.add(scored, now_s=0)
    assert taken(queue) == [0, 1] and not len(queue)


def test_a_part_that_hangs_leaves_as_many_slots_as_it_holds() -> None:
    queue = queue_of(HANGS, HANGS, GOOD, GOOD)
    queue.suspect([item(8, HANGS), item(9, HANGS)], now_s=0)
    assert taken(queue, num_slots=4, used={HANGS: 2}) == [2, 3]
    assert taken(queue, num_slots=4, used={HANGS: 2}) == []
    assert taken(queue, num_slots=5, used={HANGS: 2}) == [0], "a synchronous worker gets it alone"
    assert taken(queue, num_slots=1) == [1], "none starves"


def test_a_part_that_has_hung_leaves_a_slot() -> None:
    queue = queue_of(*[HANGS] * 5, GOOD)
    queue.suspect([item(9, HANGS)], now_s=0)
    queue.suspect([], now_s=1)
    assert taken(queue, is_async=True, num_slots=4) == [0, 1, 2, 5]
    assert taken(queue, is_async=True, num_slots=4, used={HANGS: 2, GOOD: 1}) == [3]


def test_suspects_leave_slots_to_others() -> None:
    queue = queue_of(HANGS, OTHER, GOOD)
    queue.suspect([item(7, HANGS), item(8, HANGS), item(9, OTHER)], now_s=0)
    assert taken(queue, is_async=True, num_slots=4, used={HANGS: 2, OTHER: 1}) == [2]
    assert taken(queue, is_async=True, num_slots=5, used={HANGS: 2, OTHER: 1}) == [0]
    queue = queue_of(HANGS, OTHER)
    queue.suspect([item(7, HANGS), item(9, OTHER)], now_s=0)
    assert taken(queue, num_slots=2, used={HANGS: 1}) == [1], "there are no others"


def test_a_suspect_is_trusted_after_some_time() -> None:
    queue = queue_of(HANGS, GOOD)
    queue.suspect([item(9, HANGS)], now_s=0)
    queue.suspect([], now_s=1)
    assert taken(queue, 1, used={HANGS: 1}, now_s=REMEMBERED_S - 1) == [1]
    queue.add(item(2, GOOD), now_s=REMEMBERED_S)
    assert taken(queue, used={HANGS: 1}, now_s=REMEMBERED_S) == [0, 2]


def test_nothing_is_left_to_parts_that_are_not_in_use() -> None:
    queue = queue_of(HANGS, HANGS)
    queue.suspect([item(9, HANGS)], now_s=0)
    assert taken(queue, used={HANGS: 2}) == [0, 1]
    queue = queue_of(HANGS, HANGS, GOOD)
    assert taken(queue, used={HANGS: 2}) == [0, 1, 2]
    now_s = REMEMBERED_S - 1
    queue.suspect([item(9, HANGS)], now_s=now_s)
    queue.add(item(3, HANGS), now_s=now_s)
    assert taken(queue, used={HANGS: 2}, now_s=now_s) == []
    assert taken(queue, used={HANGS: 2}, now_s=REMEMBERED_S) == [3]


def test_a_reward_holds_its_worker_after_far_longer_than_usual() -> None:
    queue = queue_of()
    assert queue.held_after_s(item(0, "new")) == TIMEOUT_S / 2
    assert queue.held_after_s(item(0, GOOD)) == 0.25
    queue.ended(item(0, GOOD), 8.0)
    assert queue.held_after_s(item(0, GOOD)) < 0.3, "one slow reward does not hide the next one"
    queue.ended(item(0, "slow"), 0.3)
    assert queue.held_after_s(item(0, "slow")) == pytest.approx(3.0)
    for _ in range(50):
        queue.ended(item(0, GOOD), 8.0)
    assert queue.held_after_s(item(0, GOOD)) == TIMEOUT_S / 2
    assert queue.held_after_s(item(0, OTHER)) == 0.25


@given(st.data())
def test_no_item_is_lost_sent_twice_or_stuck(data: st.DataObject) -> None:
    queue, num_items, sent, held = queue_of(), 0, list[int](), list[Item]()
    parts = st.sampled_from([HANGS, GOOD, ""])
    now_s = 0.0
    for _ in range(data.draw(st.integers(0, 30))):
        now_s += data.draw(st.sampled_from([0.0, REMEMBERED_S / 2]))
        match data.draw(st.sampled_from(["add", "take", "put back", "suspect"])):
            case "add":
                queue.add(item(num_items, data.draw(parts), is_alone=data.draw(st.booleans())), now_s=now_s)
                num_items += 1
            case "take":
                held += queue.take(
                    data.draw(st.integers(1, 4)),
                    is_idle=data.draw(st.booleans()),
                    is_async=data.draw(st.booleans()),
                    num_slots=data.draw(st.integers(0, 4)),
                    used=Counter(each.part for each in held),
                    now_s=now_s,
                )
            case "put back" if data.draw(st.booleans()):
                for each in held:
                    queue.add(each, now_s=now_s)
                held = []
            case "put back":
                sent += [each.number for each in held]
                held = []
            case "suspect":
                queue.suspect([item(0, part) for part in data.draw(st.lists(parts))], now_s=now_s)
    sent += [each.number for each in held]
    while len(queue):  # an idle worker gets something whenever no slot is in use
        now = taken(queue, num_slots=1, is_async=data.draw(st.booleans()), now_s=now_s)
        assert now == sorted(now) and now
        sent += now
    assert sorted(sent) == list(range(num_items))
