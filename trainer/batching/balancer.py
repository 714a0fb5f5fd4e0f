"""Divides the samples of a step over the ranks by the plan of `balance.py`.

    own samples -> sizes of all ranks -> the same plan everywhere -> samples to their ranks -> micro-batches

The step has to be complete, so nothing is run while groups are still being generated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.batching.balance import Cost, Plan, SequenceSize, plan
from trainer.batching.exchange import exchange
from trainer.batching.packing import MicroBatch, TrainingSample
from trainer.batching.shared_prefixes import PrefixFinder
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
        """Of the last plan, see `Plan`."""

    def microbatches(self, groups: Sequence[Sequence[TrainingSample]]) -> list[MicroBatch]:
        """This rank's micro-batches, one for each round, from this rank's groups. Collective.

        Raises ConfigError on every rank if a sequence of any of them is longer than the budget.
        """
        own = [sample for group in groups for sample in group]
        rows = [
            (sample.group, place, sample.trajectory.num_tokens, prefix, self._ranks.rank)
            for group in groups
            for place, (sample, prefix) in enumerate(zip(group, self._prefixes(group), strict=True))
        ]
        flat = torch.tensor(rows, dtype=torch.int64).flatten()
        table_N5 = self._ranks.gather(flat).view(-1, 5).numpy()
        # By group and place in it: the recorded order, whichever rank has fetched a group.
        order_N = np.lexsort((table_N5[:, 1], table_N5[:, 0]))
        table_N5 = table_N5[order_N]
        sizes = [
            SequenceSize(group=group, num_tokens=num_tokens, prefix=prefix)
            for group, _, num_tokens, prefix, _ in table_N5.tolist()
        ]
        made = plan(
            sizes,
            num_ranks=self._ranks.world_size,
            budget_tokens=self._budget_tokens,
            cost=self._cost,
            whole_groups=self._whole_groups,
        )
        self.busy_share = made.busy_share
        owner_N = table_N5[:, 4].tolist()
        by_place = {(row[0], row[1]): sample for row, sample in zip(rows, own, strict=True)}
        held = {
            index: by_place[group, place]
            for index, (group, place, *_, owner) in enumerate(table_N5.tolist())
            if owner == self._ranks.rank
        }
        of_rounds = placed(made, sizes, owner_N, num_ranks=self._ranks.world_size)
        leaving: list[dict[int, TrainingSample]] = [{} for _ in range(self._ranks.world_size)]
        for of_ranks in of_rounds:
            for rank, members in enumerate(of_ranks):
                if rank != self._ranks.rank:
                    leaving[rank] |= {index: held[index] for index in members if index in held}
        held |= exchange(leaving, self._ranks)
        return [
            tuple(held[index] for index in of_ranks[self._ranks.rank])
            for of_ranks in of_rounds
            if of_ranks[self._ranks.rank]
        ]

    def _prefixes(self, group: Sequence[TrainingSample]) -> list[int]:
        if not self._shares_prefixes:
            return [0] * len(group)
        finder, prefixes = PrefixFinder(), []
        for sample in group:
            prefixes.append(finder.find(sample.trajectory.tokens).length)
            finder.append(sample.trajectory.tokens)
        return prefixes


def placed(
    made: Plan, sizes: Sequence[SequenceSize], owner_N: Sequence[int], *, num_ranks: int
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
