"""Divides the sequences of a step over ranks and micro-batches so that no rank waits long for another.

Ranks run their micro-batches in lockstep, so the time of a step is the sum over rounds of the slowest rank's
micro-batch. Therefore the rounds are balanced, not only the ranks:

    groups -> units -> bins of about equal cost, under the token budget -> sorted by cost -> rounds

A unit is a part of a group that stays together, because sequences of one micro-batch share their prefix. How
finely groups are cut is a choice between equal bins and shared prefixes: several granularities are tried, and
the plan with the least time is taken. Units go into bins by longest processing time first (Graham 1969): the
most expensive unit first, each into the cheapest bin with room. This is tried with the bins of all rounds at
once, sorted by cost afterwards so that bins of nearly equal cost are in one round, and round by round, each
filled up to the cost of its most expensive unit or its fair share.

A pure function of lengths in recorded order, world size and budget: integers only, ties by position. A step
that is served again is divided in the same way.

Shape suffixes: N sequences of the step over all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from areal_like.errors import ConfigError
from trainer.batching.shared_prefixes import budget_size

_FINENESS = (1, 2, 4, 8, 16)
"""Largest units that are tried, as parts of a bin's fair share of the cost; besides whole groups and single
sequences."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the forward and backward of a sequence, in any unit: `per_row` L + `per_pair` L^2 / 2."""

    per_row: int
    per_pair: int

    def of(self, num_tokens: int, *, prefix: int) -> int:
        """Cost of a sequence whose first `prefix` tokens another one of the micro-batch computes."""
        pairs = (num_tokens * num_tokens - prefix * prefix) // 2
        return self.per_row * (num_tokens - prefix) + self.per_pair * pairs


@dataclass(frozen=True, kw_only=True)
class SequenceSize:
    """What the plan needs to know of one sequence."""

    group: int
    """Position of its group in the step. Sequences of a group follow one another."""
    num_tokens: int
    prefix: int
    """Tokens that it shares with an earlier sequence of its group."""


@dataclass(frozen=True, kw_only=True)
class Plan:
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
    members: tuple[int, ...]
    cost: int
    size: int


def plan(
    sizes: Sequence[SequenceSize],
    *,
    num_ranks: int,
    budget_tokens: int,
    cost: Cost,
    whole_groups: bool = False,
) -> Plan:
    """The micro-batches of every rank and round.

    `whole_groups`: never split a group. Raises ConfigError if a sequence (with `whole_groups`: a group) is
    longer than the budget.
    """
    if not sizes:
        return Plan(rounds=(), busy_share=1.0, time=0)
    groups = _groups(sizes)
    whole = [_unit(sizes, group, cost) for group in groups]
    least_cost = sum(unit.cost for unit in whole)
    num_rounds = -(-sum(unit.size for unit in whole) // (num_ranks * budget_tokens))
    fair = -(-least_cost // (num_ranks * num_rounds))
    limits = [] if whole_groups else [*(fair // parts for parts in _FINENESS), 0]
    plans = []
    for limit in (None, *limits):
        units = [
            unit for group in groups for unit in _cut(sizes, group, cost, budget_tokens, limit, whole_groups)
        ]
        units.sort(key=lambda unit: (-unit.cost, unit.members))
        for fill in (_all_at_once, _round_by_round):
            rounds = fill(units, num_ranks=num_ranks, num_rounds=num_rounds, budget_tokens=budget_tokens)
            plans.append((sum(each[0].cost for each in rounds), sum(unit.cost for unit in units), rounds))
    total, work, rounds = min(plans, key=lambda each: each[0])
    return Plan(
        rounds=tuple(
            (*(tuple(sorted(b.members)) for b in bins), *[()] * (num_ranks - len(bins))) for bins in rounds
        ),
        busy_share=work / (num_ranks * total),
        time=total,
    )


def _groups(sizes: Sequence[SequenceSize]) -> list[range]:
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(sizes)) if a.group != b.group), len(sizes)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _unit(sizes: Sequence[SequenceSize], members: Sequence[int], cost: Cost) -> _Unit:
    """The first member of a unit has nobody to share a prefix with."""
    prefixes = [0, *(sizes[i].prefix for i in members[1:])]
    lengths = [sizes[i].num_tokens for i in members]
    return _Unit(
        members=tuple(members),
        cost=sum(cost.of(n, prefix=prefix) for n, prefix in zip(lengths, prefixes, strict=True)),
        size=sum(budget_size(n, prefix=prefix) for n, prefix in zip(lengths, prefixes, strict=True)),
    )


def _cut(
    sizes: Sequence[SequenceSize],
    group: range,
    cost: Cost,
    budget_tokens: int,
    limit: int | None,
    whole: bool,
) -> list[_Unit]:
    """A group as units of consecutive sequences, each within the budget and, of several, below `limit`."""
    units: list[_Unit] = []
    for index in group:
        longer = _unit(sizes, [*units[-1].members, index], cost) if units else None
        if longer is not None and (
            whole or (longer.size <= budget_tokens and (limit is None or longer.cost <= limit))
        ):
            units[-1] = longer
        else:
            units.append(_unit(sizes, [index], cost))
    for unit in units:
        if unit.size > budget_tokens:
            what = "group" if whole else "sequence"
            raise ConfigError(
                f"a {what} of {unit.size} tokens does not fit trainer.tokens_per_microbatch={budget_tokens}: "
                f"raise it to at least {unit.size}"
            )
    return units


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
    while True:
        bins, rest = _fill(units, num_bins=num_ranks * num_rounds, budget_tokens=budget_tokens)
        if not rest:
            bins.sort(key=lambda each: (-each.cost, each.members))
            return [bins[at : at + num_ranks] for at in range(0, len(bins), num_ranks)]
        num_rounds += 1


def _round_by_round(
    units: Sequence[_Unit], *, num_ranks: int, num_rounds: int, budget_tokens: int
) -> list[list[_Bin]]:
    """The same, but a round takes only what does not make it longer."""
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
    units: Sequence[_Unit], *, num_bins: int, budget_tokens: int, limit: int | None = None
) -> tuple[list[_Bin], list[_Unit]]:
    """(bins that are not empty, units that fit into none). `limit`: of a bin's cost."""
    bins = [_Bin(room=budget_tokens) for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    rest = []
    for unit in units:
        full = []
        while heap and bins[heap[0][1]].room < unit.size:
            full.append(heapq.heappop(heap))
        if heap and (limit is None or heap[0][0] + unit.cost <= limit):
            cost, index = heap[0]
            heapq.heapreplace(heap, (cost + unit.cost, index))
            chosen = bins[index]
            chosen.cost, chosen.room = cost + unit.cost, chosen.room - unit.size
            chosen.members += unit.members
        else:
            rest.append(unit)
        for entry in full:
            heapq.heappush(heap, entry)
    return [each for each in bins if each.members], rest
