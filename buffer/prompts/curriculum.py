"""Curricula: choose the next prompt among a few candidates by a score of their estimated solve rate p.

    goldilocks   sqrt(p (1 - p))                        the spread of a 0/1 reward, largest at p = 1/2
                                                        (Goldilocks RL, arXiv 2602.14868)
    paced        p^(2 target) (1 - p)^(2 (1 - target))  a Beta kernel with its peak at `target`; 1/2 gives
                                                        the paper's p (1 - p) (PACED, arXiv 2603.11178, where
                                                        it weighs losses, not prompts)

`order.py` takes the next `pool` prompts of the epoch as candidates; the one with the highest score is issued,
the others are skipped until the next epoch. So in one epoch every prompt is a candidate exactly once, and one
candidate per pool is issued. With probability `exploration` it is the first one, regardless of scores. So no
prompt starves: a prompt that always has the lowest score is still issued once in `pool / exploration` epochs
on average. A choice is a pure function of the cursor and of the rewards observed.

p is a posterior mean. The evidence is the rewards of the prompt's groups, whose weight halves every
`half_life` groups (groups of all prompts, because the change of the policy makes evidence obsolete). The
prior is the mean solve rate over all prompts, with the weight of one sample; so an unseen prompt counts as an
average one. Evidence is counted in whole thousandths of a sample, so that a checkpoint (`state`) and the
ledger on disk (`scalars`) contain exactly the numbers that choices depend on. Each remembered prompt has a
numbered slot, so the number of scalars is limited by `memory`.

Left out: Goldilocks' teacher, a second model that predicts p of unseen prompts. Without it a curriculum works
only if prompts are seen repeatedly: if an epoch is longer than the run (a task with a million prompts), all
candidates have the same score and the first one is issued.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from areal_like.config import BufferConfig

_UNIT = 1000
"""Evidence of one sample."""
_PREFIX = "curriculum:"
_FIELDS = ("index", "solved", "total", "clock")
_ISSUED_SMOOTHING = 1 / 32
"""Weight of the newest prompt in the exponential mean over issued prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    slot: int
    """-1: this is the evidence over all prompts."""
    index: int
    solved: int
    total: int
    clock: int
    """Number of complete groups when the prompt was last observed; different for each prompt."""


class Curriculum:
    """Observes every complete group and chooses among candidates.

    `settings.curriculum_memory` bounds the memory.
    """

    def __init__(self, settings: BufferConfig) -> None:
        """`settings.curriculum`: goldilocks or paced."""
        self.settings = settings
        self._clock = 0
        self._all = _Evidence(slot=-1, index=-1, solved=_UNIT // 2, total=_UNIT, clock=0)
        self._of: OrderedDict[int, _Evidence] = OrderedDict()
        self.issued_solve_rate = 0.5
        """Estimated solve rate of recently issued prompts, an exponential mean."""
        self.num_explored = 0
        """Choices since the process started that took the first candidate regardless of scores."""

    def choose(self, candidates: Sequence[int], *, uniform: float) -> int:
        """The candidate to issue. The random number `uniform` in [0, 1) decides about exploration."""
        if uniform < self.settings.curriculum_exploration:
            self.num_explored += 1
            chosen = candidates[0]
        else:
            chosen = max(candidates, key=lambda index: self._score(self.solve_rate(index)))
        self.issued_solve_rate += _ISSUED_SMOOTHING * (self.solve_rate(chosen) - self.issued_solve_rate)
        return chosen

    def observe(self, index: int, rewards: Sequence[float]) -> dict[str, int]:
        """Counts a complete group of prompt `index`, and returns the scalars that changed.

        Groups that the filter drops count too: a group without spread is the most informative about its
        prompt.
        """
        low, high = self.settings.curriculum_reward_low, self.settings.curriculum_reward_high
        rates = [min(max((reward - low) / (high - low), 0.0), 1.0) for reward in rewards]
        solved, total = round(_UNIT * math.fsum(rates)), _UNIT * len(rates)
        self._clock += 1
        self._all = self._aged(self._all, solved, total)
        known = self._of.pop(index, None)
        if known is None:
            full = len(self._of) >= self.settings.curriculum_memory
            slot = self._of.popitem(last=False)[1].slot if full else len(self._of)
            known = _Evidence(slot=slot, index=index, solved=0, total=0, clock=self._clock)
        self._of[index] = self._aged(known, solved, total)
        return _scalars((self._all, self._of[index]))

    @property
    def mean_solve_rate(self) -> float:
        """Mean solve rate over all prompts, with more weight on recent groups."""
        return self._all.solved / self._all.total

    def solve_rate(self, index: int) -> float:
        """Posterior mean of one prompt's solve rate."""
        evidence = self._of.get(index)
        if evidence is None:
            return self.mean_solve_rate
        weight = self._weight(evidence)
        return (weight * evidence.solved + _UNIT * self.mean_solve_rate) / (weight * evidence.total + _UNIT)

    def status(self) -> dict[str, float | str]:
        """The entry `curriculum` of /status."""
        return {
            "kind": self.settings.curriculum,
            "solve_rate": round(self.mean_solve_rate, 4),
            "issued_solve_rate": round(self.issued_solve_rate, 4),
            "prompts_remembered": len(self._of),
            "choices_explored": self.num_explored,
        }

    def state(self) -> list[int]:
        """The numbers that later choices depend on, for a checkpoint: 4 per remembered prompt, and 4 more."""
        flat = []
        for each in (self._all, *self._of.values()):
            flat += [each.index, each.solved, each.total, each.clock]
        return flat

    def scalars(self) -> dict[str, int]:
        """The same numbers by name, for the ledger on disk; `observe` changes a few of them at a time."""
        return _scalars((self._all, *self._of.values()))

    def restore(self, state: Sequence[int]) -> None:
        """Continues from `state`. Renumbers the slots, so all `scalars` have to be written again.

        Raises ValueError if `state` is malformed.
        """
        rows = [tuple(state[at : at + 4]) for at in range(0, len(state) - 3, 4)]
        is_well_formed = bool(rows) and 4 * len(rows) == len(state) and rows[0][0] == -1 and rows[0][2] > 0
        if not is_well_formed or not all(
            0 <= solved <= total and 0 <= clock <= rows[0][3] for _, solved, total, clock in rows
        ):
            raise ValueError("not the state of a curriculum")
        self._clock = rows[0][3]
        # A row without evidence is a slot that was cleared.
        observed = sorted((row for row in rows[1:] if row[2]), key=lambda row: row[3])
        newest = {index: (solved, total, clock) for index, solved, total, clock in observed}
        kept = list(newest.items())[-self.settings.curriculum_memory :]
        self._all = _Evidence(slot=-1, index=-1, solved=rows[0][1], total=rows[0][2], clock=self._clock)
        self._of = OrderedDict(
            (index, _Evidence(slot=slot, index=index, solved=solved, total=total, clock=clock))
            for slot, (index, (solved, total, clock)) in enumerate(kept)
        )

    def _score(self, solve_rate: float) -> float:
        if self.settings.curriculum == "goldilocks":
            return math.sqrt(solve_rate * (1 - solve_rate))
        target = self.settings.curriculum_target
        return float(solve_rate ** (2 * target) * (1 - solve_rate) ** (2 * (1 - target)))

    def _weight(self, evidence: _Evidence) -> float:
        return float(0.5 ** ((self._clock - evidence.clock) / self.settings.curriculum_half_life))

    def _aged(self, evidence: _Evidence, solved: int, total: int) -> _Evidence:
        weight = self._weight(evidence)
        return replace(
            evidence,
            solved=round(weight * evidence.solved) + solved,
            total=round(weight * evidence.total) + total,
            clock=self._clock,
        )


def _scalars(evidences: Iterable[_Evidence]) -> dict[str, int]:
    return {f"{_PREFIX}{each.slot}:{name}": getattr(each, name) for each in evidences for name in _FIELDS}


def curriculum_scalars(scalars: Mapping[str, int]) -> dict[str, int]:
    """The curriculum's scalars among all scalars of a store."""
    return {name: value for name, value in scalars.items() if name.startswith(_PREFIX)}


def state_from_scalars(scalars: Mapping[str, int]) -> list[int]:
    """The `state` that a curriculum's scalars represent."""
    slots = sorted({int(name.split(":")[1]) for name in scalars})
    return [scalars[f"{_PREFIX}{slot}:{name}"] for slot in slots for name in _FIELDS]
