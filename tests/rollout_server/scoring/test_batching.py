"""The texts of a forward pass: padding within its limit, the oldest always first."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.scoring.batching import BatchQueue, Waiting


def text(length: int, *, deadline_s: float = math.inf) -> Waiting:
    return Waiting(tokens=[1] * length, deadline_s=deadline_s)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 100))
def test_batches_are_bounded_and_nothing_starves(lengths: list[int], max_tokens: int) -> None:
    queue = BatchQueue(max_waiting=len(lengths), max_tokens=max_tokens)
    texts = [text(length) for length in lengths]
    assert all(map(queue.add, texts)) and not queue.add(text(1))
    left = list(texts)
    while left:
        batch = queue.take_batch()
        assert left[0] in batch, "the oldest"
        sizes = [len(one.tokens) for one in batch]
        assert sizes == sorted(sizes) and (len(batch) == 1 or max(sizes) * len(batch) <= max_tokens)
        left = [one for one in left if one not in batch]
        assert len(queue) == len(left)
    assert queue.take_batch() == []


def test_texts_of_similar_length_are_scored_together() -> None:
    queue = BatchQueue(max_waiting=9, max_tokens=40)
    for length in (10, 39, 9, 38, 11, 8):
        queue.add(text(length))
    batches = [[len(one.tokens) for one in queue.take_batch()] for _ in range(4)]
    assert batches == [[8, 9, 10], [39], [38], [11]] and not len(queue)


def test_late_texts_are_taken_out() -> None:
    queue = BatchQueue(max_waiting=3, max_tokens=10)
    texts = [text(1, deadline_s=deadline_s) for deadline_s in (5.0, 2.0, 9.0)]
    for one in texts:
        queue.add(one)
    assert queue.take_late(now_s=5.0) == texts[:2] and queue.take_all() == texts[2:] and not len(queue)
