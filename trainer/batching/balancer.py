"""Divides the samples of a step over the ranks by the plan of `balance.py`.

    own samples -> sizes of all ranks -> the same plan everywhere -> samples to their ranks -> micro-batches

The step has to be complete, so no micro-batch runs while groups are still being generated. Every data rank
has fetched its own groups. A sample for another rank is sent there as one msgpack message with only the
fields that a micro-batch needs; a sample that stays is not encoded. The other ranks of context groups have no
samples and get no micro-batches here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgpack
import numpy as np
import torch

from areal_like.errors import ArealError
from trainer.batching.balance import Cost, MicrobatchPlan, SequenceSize, plan
from trainer.batching.packing import sequences_of, too_long_of
from trainer.batching.sample_messages import decoded, encoded
from trainer.batching.shared_prefixes import Prefix, PrefixFinder
from trainer.batching.training_sample import MicroBatch, TrainingSample
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
        route_bytes: int = 0,
    ) -> None:
        """`budget_tokens`: most tokens of a micro-batch. `whole_groups`: never split a group over two.

        `route_bytes`: most bytes of a token's routes; 0: samples have none.
        """
        self._ranks = ranks
        self._cost = cost
        self._budget_tokens = budget_tokens
        self._whole_groups = whole_groups
        self._shares_prefixes = shares_prefixes
        self._route_bytes = route_bytes
        self.busy_share = 1.0
        """Balance of the last plan, see `MicrobatchPlan`."""
        self.set_aside: list[TrainingSample] = []
        """This rank's samples that are in no micro-batch of the last plan, because they are too long."""

    def microbatches(self, groups: Iterable[Sequence[TrainingSample]]) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches, one for each round, once the last group is there. Collective.

        The sequences of a sample stay together.

        Raises ConfigError on every rank if a sequence of any of them is longer than the budget.
        """
        self.set_aside = []
        yield from self._divided([self._fitting(group) for group in groups])

    def _fitting(self, group: Sequence[TrainingSample]) -> list[TrainingSample]:
        """The samples without those that it sets aside."""
        if self._whole_groups:
            return list(group)
        too_long = too_long_of(
            group, budget_tokens=self._budget_tokens, shares_prefixes=self._shares_prefixes
        )
        self.set_aside += too_long
        return [sample for sample in group if sample not in too_long]

    def _divided(self, groups: Sequence[Sequence[TrainingSample]]) -> list[MicroBatch]:
        # A row for each sequence; the sample is held at its first.
        own = [s for group in groups for s in group for _ in s.trajectory.segment_slices]
        rows = [
            (self._ranks.data_rank, place, *size)
            for group in groups
            for place, size in enumerate(self._sizes(group))
        ]
        flat = torch.tensor(rows, dtype=torch.int64).flatten()
        table_NC = self._ranks.gather(flat).view(-1, 2 + len(SequenceSize._fields)).numpy()
        # By group and index in the group: the recorded order, whichever rank has fetched a group.
        order_N = np.lexsort((table_NC[:, 1], table_NC[:, 2]))
        table = table_NC[order_N].tolist()
        sizes = [SequenceSize(*size) for _, _, *size in table]
        num_data, mine = self._ranks.num_data, self._ranks.data_rank
        made = plan(
            sizes,
            num_ranks=num_data,
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
            if owner == mine and self._ranks.has_samples
        }
        of_rounds = placed(made, sizes, owner_N, num_ranks=num_data)
        leaving: list[dict[int, TrainingSample]] = [{} for _ in range(self._ranks.world_size)]
        arriving: list[dict[int, int]] = [{} for _ in range(self._ranks.world_size)]
        if not self._ranks.has_samples:
            exchange(leaving, arriving, self._ranks, route_bytes=self._route_bytes)
            return []
        first, each_rank = 0, self._ranks.context_parallel
        for of_ranks in of_rounds:
            for data_rank, members in enumerate(of_ranks):
                for index in members:
                    first = first if sizes[index].continues else index
                    if data_rank == mine and index not in held:
                        expected = arriving[owner_N[index] * each_rank]
                        expected[first] = expected.get(first, 0) + sizes[index].num_tokens
                    elif data_rank != mine and index in held:
                        leaving[data_rank * each_rank][first] = held[index]
        held |= exchange(leaving, arriving, self._ranks, route_bytes=self._route_bytes)
        return [
            tuple(held[index] for index in of_ranks[mine] if not sizes[index].continues)
            for of_ranks in of_rounds
            if of_ranks[mine]
        ]

    def _sizes(self, group: Sequence[TrainingSample]) -> list[SequenceSize]:
        finder, sizes, last = PrefixFinder(), list[SequenceSize](), None
        for sample in group:
            first, of_sample = len(sizes), PrefixFinder()
            for place, sequence in enumerate(sequences_of(sample.trajectory), start=first):
                found, of_last = Prefix(), PrefixFinder()
                # A sample's later sequences share with its earlier ones, which are always in the same unit.
                earlier, start = (of_sample, first) if place > first else (finder, 0)
                if last is not None and self._shares_prefixes:
                    found = earlier.find(sequence)
                    of_last.append(last)
                sizes.append(
                    SequenceSize(
                        group=sample.group,
                        num_tokens=sequence.num_tokens,
                        prefix=found.length,
                        distance=place - start - found.source if found.length else 1,
                        prefix_of_last=of_last.find(sequence).length,
                        continues=place > first,
                    )
                )
                finder.append(sequence)
                of_sample.append(sequence)
                last = sequence
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


_BYTES_PER_TOKEN = 38
"""Bytes of the arrays in `sample_messages.py`, of an advantage, a lag, a flag and a teacher's log-prob for
each token, and of the length of a segment."""
_BYTES_PER_SAMPLE = 656
"""Most bytes of a sample in addition to its tokens, among them its label, and of the list that it is in."""


def exchange(
    leaving: Sequence[Mapping[int, TrainingSample]],
    arriving: Sequence[Mapping[int, int]],
    ranks: Ranks,
    *,
    route_bytes: int = 0,
) -> dict[int, TrainingSample]:
    """The samples that the other ranks send to this one, by index. Collective.

    `leaving`: for each rank, the samples that go there, by their index in the step. `arriving`: for each
    rank, the tokens of the samples that come from there, by index. `route_bytes`: most bytes of the routes of
    a token. Raises ArealError if others come.
    """
    received = ranks.exchange(
        [
            msgpack.packb([[index, encoded(sample)] for index, sample in of_rank.items()])
            for of_rank in leaving
        ],
        most_bytes=[
            _BYTES_PER_SAMPLE * (1 + len(of_rank)) + (_BYTES_PER_TOKEN + route_bytes) * sum(of_rank.values())
            for of_rank in arriving
        ],
    )
    samples: dict[int, TrainingSample] = {}
    for rank, (data, expected) in enumerate(zip(received, arriving, strict=True)):
        try:
            of_rank = {index: decoded(fields) for index, fields in msgpack.unpackb(data)}
        except (ValueError, TypeError, KeyError) as error:
            raise ArealError(f"rank {rank} sent samples that cannot be read: {error!r}") from error
        if {index: sample.trajectory.num_tokens for index, sample in of_rank.items()} != expected:
            raise ArealError(f"rank {rank} sent other samples than this step's plan says")
        samples |= of_rank
    return samples
