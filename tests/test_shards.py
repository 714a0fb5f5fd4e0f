"""How a job is split over several buffers: the arithmetic, and ledgers that keep to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import ConfigError
from areal_like.shards import WHOLE, Shard, all_shards
from buffer.prompts import PromptOrder

counts = st.integers(1, 9)


@given(count=counts, total=st.integers(0, 500))
def test_shards_share_everything_evenly_and_without_overlap(count: int, total: int) -> None:
    owned = [[number for number in range(total) if shard.owns(number)] for shard in all_shards(count)]
    assert sorted(number for numbers in owned for number in numbers) == list(range(total))
    assert [len(numbers) for numbers in owned] == [shard.share(total) for shard in all_shards(count)]
    assert all(before - after in (0, 1) for before, after in pairwise(map(len, owned))), "the first shards have one more"
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(count=counts, number=st.integers(0, 1 << 62))
def test_a_number_says_whose_it_is(count: int, number: int) -> None:
    shard = Shard.of(number, count=count)
    assert shard.owns(number) and shard.number(shard.local(number)) == number
    assert not any(other.owns(number) for other in all_shards(count) if other != shard)
    assert count > 1 or shard.local(number) == number


@given(count=counts, num_places=st.integers(1, 60))
def test_places_of_a_step_are_merged_by_local_position_then_shard(count: int, num_places: int) -> None:
    places = [(shard.local(p), shard.index) for p in range(num_places) for shard in [Shard.of(p, count=count)]]
    assert places == sorted((local, shard.index) for shard in all_shards(count) for local in range(shard.share(num_places)))


@given(count=counts, num_prompts=st.integers(1, 80), seed=st.integers(0, 99))
def test_every_epoch_of_a_shard_is_its_own_prompts(count: int, num_prompts: int, seed: int) -> None:
    for shard in all_shards(count):
        own = shard.share(num_prompts)
        order = PromptOrder(seed=seed, num_prompts=num_prompts, shard=shard)
        for _ in range(2):
            assert sorted(order.next().index for _ in range(own)) == [index for index in range(num_prompts) if shard.owns(index)]


def test_a_daemon_is_told_by_its_name_which_shard_it_is() -> None:
    assert Shard.named("anything", count=1) == WHOLE and WHOLE.name == "buffer" and WHOLE.ledger == "ledger"
    assert [Shard.named(f"buffer-{index}", count=3) for index in range(3)] == all_shards(3)
    assert [shard.ledger for shard in all_shards(2)] == ["ledger-0", "ledger-1"]
    for wrong in ("buffer", "buffer-3", "buffer-x"):
        with pytest.raises(ConfigError, match="--name buffer-0 or buffer-1 or buffer-2"):
            Shard.named(wrong, count=3)
