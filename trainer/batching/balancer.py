"""Divides the samples of a step over the ranks by the plan of `balance.py`.

    own samples -> sizes of all ranks -> the same plan everywhere -> samples to their ranks -> micro-batches

The step has to be complete, so no micro-batch runs while groups are still being generated. Every rank has
fetched its own groups. A sample for another rank is sent there as one msgpack message with only the fields
that a micro-batch needs; a sample that stays is not encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.errors import ArealError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.balance import Cost, MicrobatchPlan, SequenceSize, plan
from trainer.batching.packing import MicroBatch, SampleCounts, TrainingSample
from trainer.batching.shared_prefixes import Prefix, PrefixFinder
from trainer.distributed.ranks import Ranks


class Balancer:
    """Called once in each step, on every rank."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        cost: Cost,
        budget_tokens: int,
        whole_groups: bool = False,
        shares_prefixes: bool = True,
    ) -> None:
        """`budget_tokens`: most tokens of a micro-batch. `whole_groups`: never split a group over two."""
        self._ranks = ranks
        self._cost = cost
        self._budget_tokens = budget_tokens
        self._whole_groups = whole_groups
        self._shares_prefixes = shares_prefixes
        self.busy_share = 1.0
        """Balance of the last plan, see `MicrobatchPlan`."""

    def microbatches(self, groups: Iterable[Sequence[TrainingSample]]) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches, one for each round, once the last group is there. Collective.

        Raises ConfigError on every rank if a sequence of any of them is longer than the budget.
        """
        yield from self._divided(list(groups))

    def _divided(self, groups: Sequence[Sequence[TrainingSample]]) -> list[MicroBatch]:
        own = [sample for group in groups for sample in group]
        rows = [
            (self._ranks.rank, place, *size)
            for group in groups
            for place, size in enumerate(self._sizes(group))
        ]
        flat = torch.tensor(rows, dtype=torch.int64).flatten()
        table_NC = self._ranks.gather(flat).view(-1, 2 + len(SequenceSize._fields)).numpy()
        # By group and index in the group: the recorded order, whichever rank has fetched a group.
        order_N = np.lexsort((table_NC[:, 1], table_NC[:, 2]))
        table = table_NC[order_N].tolist()
        sizes = [SequenceSize(*size) for _, _, *size in table]
        made = plan(
            sizes,
            num_ranks=self._ranks.world_size,
            budget_tokens=self._budget_tokens,
            cost=self._cost,
            whole_groups=self._whole_groups,
        )
        self.busy_share = made.busy_share
        owner_N = [owner for owner, *_ in table]
        by_place = {(place, group): sample for (_, place, group, *_), sample in zip(rows, own, strict=True)}
        held = {
            index: by_place[place, group]
            for index, (owner, place, group, *_) in enumerate(table)
            if owner == self._ranks.rank
        }
        of_rounds = placed(made, sizes, owner_N, num_ranks=self._ranks.world_size)
        leaving: list[dict[int, TrainingSample]] = [{} for _ in range(self._ranks.world_size)]
        arriving: list[dict[int, int]] = [{} for _ in range(self._ranks.world_size)]
        for of_ranks in of_rounds:
            for rank, members in enumerate(of_ranks):
                for index in members:
                    if rank == self._ranks.rank and index not in held:
                        arriving[owner_N[index]][index] = sizes[index].num_tokens
                    elif rank != self._ranks.rank and index in held:
                        leaving[rank][index] = held[index]
        held |= exchange(leaving, arriving, self._ranks)
        return [
            tuple(held[index] for index in of_ranks[self._ranks.rank])
            for of_ranks in of_rounds
            if of_ranks[self._ranks.rank]
        ]

    def _sizes(self, group: Sequence[TrainingSample]) -> list[SequenceSize]:
        finder, sizes = PrefixFinder(), []
        for place, sample in enumerate(group):
            tokens = sample.trajectory.tokens
            found, of_last = Prefix(), PrefixFinder()
            if place and self._shares_prefixes:
                found = finder.find(tokens)
                of_last.append(group[place - 1].trajectory.tokens)
            sizes.append(
                SequenceSize(
                    group=sample.group,
                    num_tokens=len(tokens),
                    prefix=found.length,
                    distance=place - found.source if found.length else 1,
                    prefix_of_last=of_last.find(tokens).length,
                )
            )
            finder.append(tokens)
        return sizes


def placed(
    made: MicrobatchPlan, sizes: Sequence[SequenceSize], owner_N: Sequence[int], *, num_ranks: int
) -> list[list[tuple[int, ...]]]:
    """The plan's rounds with their micro-batches on ranks that have as many of their tokens as possible."""
    rounds = []
    for members_of_bins in made.rounds:
        owned = [[0] * num_ranks for _ in members_of_bins]
        for tokens_of_ranks, members in zip(owned, members_of_bins, strict=True):
            for index in members:
                tokens_of_ranks[owner_N[index]] += sizes[index].num_tokens
        wishes = sorted(
            (-tokens, at, rank) for at, of_ranks in enumerate(owned) for rank, tokens in enumerate(of_ranks)
        )
        of_round: list[tuple[int, ...] | None] = [None] * num_ranks
        waiting = set(range(len(members_of_bins)))
        for _, at, rank in wishes:
            if at in waiting and of_round[rank] is None:
                of_round[rank] = members_of_bins[at]
                waiting.remove(at)
        rounds.append([members or () for members in of_round])
    return rounds


_TOKEN_ARRAYS = {"tokens": "<i4", "loss_mask": "u1", "logprobs": "<f4", "versions": "<i4"}
_ADDED = {"advantage": "<f8", "lag": "<i8", "beyond": "?"}
"""Values of a `TrainingSample`: an array with an entry for each token, one number for all, or None."""
_BYTES_PER_TOKEN = 30
"""Bytes of the arrays above, and of an advantage, a lag and a flag for each token."""
_BYTES_PER_SAMPLE = 256
"""Most bytes of a sample in addition to its tokens, and of the list that it is in."""


def exchange(
    leaving: Sequence[Mapping[int, TrainingSample]], arriving: Sequence[Mapping[int, int]], ranks: Ranks
) -> dict[int, TrainingSample]:
    """The samples that the other ranks send to this one, by index. Collective.

    `leaving`: for each rank, the samples that go there, by their index in the step. `arriving`: for each
    rank, the tokens of the samples that come from there, by index. Raises ArealError if others come.
    """
    received = ranks.exchange(
        [
            msgpack.packb([[index, _encoded(sample)] for index, sample in of_rank.items()])
            for of_rank in leaving
        ],
        most_bytes=[
            _BYTES_PER_SAMPLE * (1 + len(of_rank)) + _BYTES_PER_TOKEN * sum(of_rank.values())
            for of_rank in arriving
        ],
    )
    samples: dict[int, TrainingSample] = {}
    for rank, (data, expected) in enumerate(zip(received, arriving, strict=True)):
        try:
            of_rank = {index: _decoded(fields) for index, fields in msgpack.unpackb(data)}
        except (ValueError, TypeError, KeyError) as error:
            raise ArealError(f"rank {rank} sent samples that cannot be read: {error!r}") from error
        if {index: sample.trajectory.num_tokens for index, sample in of_rank.items()} != expected:
            raise ArealError(f"rank {rank} sent other samples than this step's plan says")
        samples |= of_rank
    return samples


def _encoded(sample: TrainingSample) -> dict[str, Any]:
    trajectory = sample.trajectory
    values = {name: getattr(sample, name) for name in _ADDED}
    return {
        **{name: _bytes(getattr(trajectory, name), dtype) for name, dtype in _TOKEN_ARRAYS.items()},
        **{name: None if value is None else _bytes(value, _ADDED[name]) for name, value in values.items()},
        "reward": float(trajectory.reward),
        "finish_reason": trajectory.finish_reason.value,
        "group": sample.group,
        "counts": sample.counts,
    }


def _decoded(fields: dict[str, Any]) -> TrainingSample:
    arrays: dict[str, Any] = {name: _array(fields[name], dtype) for name, dtype in _TOKEN_ARRAYS.items()}
    num_tokens = len(arrays["tokens"])
    added: dict[str, Any] = {}
    for name, dtype in _ADDED.items():
        if fields[name] is not None:
            array = _array(fields[name], dtype)
            if len(array) not in (1, num_tokens):
                raise ValueError(f"{len(array)} numbers for {num_tokens} tokens")
            added[name] = array if len(array) == num_tokens else array.item()
    return TrainingSample(
        trajectory=Trajectory(
            **arrays,
            reward=fields["reward"],
            finish_reason=FinishReason(fields["finish_reason"]),
        ),
        group=int(fields["group"]),
        counts=None if fields["counts"] is None else SampleCounts(*fields["counts"]),
        **added,
    )


def _bytes(value: Any, dtype: str) -> bytes:
    return np.ascontiguousarray(value, dtype=dtype).tobytes()


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(data, dtype=dtype).copy()  # a tensor needs memory that may be written
