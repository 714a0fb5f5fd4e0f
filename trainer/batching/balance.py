"""Divides the sequences of a step over ranks and micro-batches so that no rank waits long for another.

Ranks run their micro-batches in lockstep, so the time of a step is the sum over rounds of the slowest rank's
micro-batch. Therefore the rounds are balanced, not only the ranks:

    groups -> units -> bins of about equal cost, under the token budget -> sorted by cost -> rounds

A unit is a part of a group that stays together, because sequences of one micro-batch share their prefix, and
a sample's sequences are trained on together.
Finer units balance the bins better, coarser ones share more prefixes: several granularities are tried, and
the plan with the least time is taken. Units go into bins by longest processing time first (Graham 1969): the
most expensive unit first, each into the cheapest bin with room. This is tried with the bins of all rounds at
once, sorted by cost afterwards so that bins of nearly equal cost are in one round, and round by round, each
filled up to the cost of its most expensive unit or its fair share.

The plan is a pure function of lengths in recorded order, world size and budget, with integers only and ties
by position, so that a step that is served again is divided in the same way.

Shape suffixes: N sequences of the step over all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from areal_like.errors import ConfigError
from trainer.batching.shared_prefixes import budget_size

_FINENESS = (1, 2, 4, 8, 16)
"""Largest units that are tried in addition to whole groups and single sequences, as parts of a bin's fair
share of the cost."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of the forward and backward of a sequence, in any unit: `per_row` L + `per_pair` L^2 / 2."""

    per_row: int
    per_pair: int

    def of(self, num_tokens: int, *, prefix: int) -> int:
        """Cost of a sequence whose first `prefix` tokens another one of the micro-batch computes."""
        pairs = (num_tokens * num_tokens - prefix * prefix) // 2
        return self.per_row * (num_tokens - prefix) + self.per_pair * pairs


class SequenceSize(NamedTuple):
    """The data about one sequence that the plan needs."""

    group: int
    """Position of its group in the step. Sequences of a group follow one another."""
    num_tokens: int
    prefix: int
    """Tokens that it shares with an earlier sequence of its group."""
    distance: int = 1
    """Distance to that earlier sequence: 1 is the sequence before it, 2 the one before that."""
    prefix_of_last: int = 0
    """With a distance above 1: tokens that it shares with the sequence before it."""
    continues: bool = False
    """It belongs to the same sample as the sequence before it, and stays with it."""

    def prefix_after(self, num_before: int) -> int:
        """Tokens that it shares if only `num_before` sequences before it are in its micro-batch."""
        if num_before >= self.distance:
            return self.prefix
        return self.prefix_of_last if num_before else 0


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlan:
    """Micro-batches of a step."""

    rounds: tuple[tuple[tuple[int, ...], ...], ...]
    """For each round, for each rank: indices in 0..N-1, ascending; empty for a rank without work."""
    busy_share: float
    """Cost of all micro-batches over that of the most expensive one of each round on every rank: 1 if no rank
    waits."""
    time: int
    """Cost of the most expensive micro-batch of each round, added up."""


@dataclass(frozen=True)
class _Unit:
    """Sequences `start` to `stop` - 1."""

    start: int
    stop: int
    cost: int = 0
    size: int = 0

    def extended(self, sequences: Sequence[SequenceSize], cost: Cost) -> _Unit:
        """The unit and the sequences after it. The first sequence has no other to share a prefix with."""
        unit = self
        for sequence in sequences:
            prefix = sequence.prefix_after(unit.stop - unit.start)
            unit = _Unit(
                start=unit.start,
                stop=unit.stop + 1,
                cost=unit.cost + cost.of(sequence.num_tokens, prefix=prefix),
                size=unit.size + budget_size(sequence.num_tokens, prefix=prefix),
            )
        return unit


def plan(
    sizes: Sequence[SequenceSize],
    *,
    num_ranks: int,
    budget_tokens: int,
    cost: Cost,
    whole_groups: bool = False,
) -> MicrobatchPlan:
    """The micro-batches of every rank and round.

    `whole_groups`: never split a group. Raises ConfigError if a sequence (with `whole_groups`: a group) is
    longer than the budget.
    """
    if not sizes:
        return MicrobatchPlan(rounds=(), busy_share=1.0, time=0)
    groups = _groups(sizes)
    whole = [unit for group in groups for unit in _cut(sizes, group, cost)]
    num_rounds = -(-sum(unit.size for unit in whole) // (num_ranks * budget_tokens))
    fair = -(-sum(unit.cost for unit in whole) // (num_ranks * num_rounds))
    cuts = [whole]
    if not whole_groups:
        limits = (None, *(fair // parts for parts in _FINENESS), 0)
        cuts = [
            [
                unit
                for group in groups
                for unit in _cut(sizes, group, cost, most_size=budget_tokens, most_cost=limit)
            ]
            for limit in limits
        ]
    _check(cuts[0], budget_tokens, what="group" if whole_groups else "sequence")
    plans = []
    for units in [units for at, units in enumerate(cuts) if units not in cuts[:at]]:
        units.sort(key=lambda unit: (-unit.cost, unit.start))
        for fill in (_all_at_once, _round_by_round):
            rounds = fill(units, num_ranks=num_ranks, num_rounds=num_rounds, budget_tokens=budget_tokens)
            plans.append((sum(each[0].cost for each in rounds), sum(unit.cost for unit in units), rounds))
    total, work, rounds = min(plans, key=lambda each: each[0])
    return MicrobatchPlan(
        rounds=tuple(
            (*(tuple(sorted(b.members)) for b in bins), *[()] * (num_ranks - len(bins))) for bins in rounds
        ),
        busy_share=work / (num_ranks * total),
        time=total,
    )


def _groups(sizes: Sequence[SequenceSize]) -> list[range]:
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(sizes)) if a.group != b.group), len(sizes)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _cut(
    sizes: Sequence[SequenceSize],
    group: range,
    cost: Cost,
    *,
    most_size: int | None = None,
    most_cost: int | None = None,
) -> list[_Unit]:
    """Cuts a group into units of consecutive sequences; units of several samples keep to the limits."""
    units: list[_Unit] = []
    starts = [index for index in group if index == group.start or not sizes[index].continues]
    for start, stop in pairwise([*starts, group.stop]):
        if units:
            longer = units[-1].extended(sizes[start:stop], cost)
            if (most_size is None or longer.size <= most_size) and (
                most_cost is None or longer.cost <= most_cost
            ):
                units[-1] = longer
                continue
        units.append(_Unit(start=start, stop=start).extended(sizes[start:stop], cost))
    return units


def _check(units: Sequence[_Unit], budget_tokens: int, *, what: str) -> None:
    for unit in units:
        if unit.size > budget_tokens:
            raise ConfigError(
                f"a {what} of {unit.size} tokens does not fit trainer.tokens_per_microbatch={budget_tokens}: "
                f"raise it to at least {unit.size}"
            )


@dataclass
class _Bin:
    """A micro-batch that is being filled."""

    room: int
    cost: int = 0
    members: list[int] = field(default_factory=list)


def _all_at_once(
    units: Sequence[_Unit], *, num_ranks: int, num_rounds: int, budget_tokens: int
) -> list[list[_Bin]]:
    """Rounds of at most `num_ranks` bins, the most expensive first; more rounds where units do not fit."""
    too_few, more = num_rounds - 1, 1
    while (bins := _fill_all(units, num_bins=num_ranks * num_rounds, budget_tokens=budget_tokens)) is None:
        too_few, num_rounds, more = num_rounds, num_rounds + more, 2 * more
    while num_rounds - too_few > 1:
        middle = (too_few + num_rounds) // 2
        fewer = _fill_all(units, num_bins=num_ranks * middle, budget_tokens=budget_tokens)
        if fewer is None:
            too_few = middle
        else:
            bins, num_rounds = fewer, middle
    bins.sort(key=lambda each: (-each.cost, each.members))
    return [bins[at : at + num_ranks] for at in range(0, len(bins), num_ranks)]


def _fill_all(units: Sequence[_Unit], *, num_bins: int, budget_tokens: int) -> list[_Bin] | None:
    """Bins that are not empty; None if a unit fits into none."""
    bins, rest = _fill(units, num_bins=num_bins, budget_tokens=budget_tokens, leaves_none=True)
    return None if rest else bins


def _round_by_round(
    units: Sequence[_Unit], *, num_ranks: int, num_rounds: int, budget_tokens: int
) -> list[list[_Bin]]:
    """Like `_all_at_once`, but a round takes only units that do not make it longer."""
    rounds: list[list[_Bin]] = []
    rest = list(units)
    while rest:
        left = max(num_rounds - len(rounds), 1)
        fair = -(-sum(unit.cost for unit in rest) // (num_ranks * left))
        limit = None if left == 1 else max(rest[0].cost, fair)
        bins, rest = _fill(rest, num_bins=num_ranks, budget_tokens=budget_tokens, limit=limit)
        rounds.append(sorted(bins, key=lambda each: (-each.cost, each.members)))
    return rounds


def _fill(
    units: Sequence[_Unit],
    *,
    num_bins: int,
    budget_tokens: int,
    limit: int | None = None,
    leaves_none: bool = False,
) -> tuple[list[_Bin], list[_Unit]]:
    """(bins that are not empty, units that fit into none).

    `units`: by decreasing cost. `limit`: largest cost of a bin. `leaves_none`: stop at the first that does
    not fit.
    """
    bins = [_Bin(room=budget_tokens) for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    least_sizes = list(accumulate((unit.size for unit in reversed(units)), min))[::-1]
    rest: list[_Unit] = []
    for at, (unit, least_size) in enumerate(zip(units, least_sizes, strict=True)):
        if not heap or (limit is not None and heap[0][0] + units[-1].cost > limit):
            return [each for each in bins if each.members], [*rest, *units[at:]]
        full = []
        while heap and bins[heap[0][1]].room < unit.size:
            entry = heapq.heappop(heap)
            if bins[entry[1]].room >= least_size:  # else no later unit fits, either
                full.append(entry)
        if heap and (limit is None or heap[0][0] + unit.cost <= limit):
            cost, index = heap[0]
            heapq.heapreplace(heap, (cost + unit.cost, index))
            chosen = bins[index]
            chosen.cost, chosen.room = cost + unit.cost, chosen.room - unit.size
            chosen.members += range(unit.start, unit.stop)
        else:
            rest.append(unit)
            if leaves_none:
                break
        for entry in full:
            heapq.heappush(heap, entry)
    return [each for each in bins if each.members], rest
