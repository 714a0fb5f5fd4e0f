"""Which of a few candidate prompts is worth a group now: curricula over the estimated solve rate.

    goldilocks   sqrt(p (1 - p))                        the spread of a 0/1 reward, largest at p = 1/2 (Goldilocks RL, arXiv 2602.14868)
    paced        p^(2 target) (1 - p)^(2 (1 - target))  a Beta kernel with its peak at `target`; 1/2 gives the paper's p (1 - p)
                                                        (PACED, arXiv 2603.11178, where it weighs losses and not the choice of prompts)

The order of prompts (`prompts.py`) hands over `pool` neighbours; the best is issued, the others are passed over until the next epoch. So
the law over an epoch is: *every prompt is a candidate exactly once, one candidate in `pool` is issued, and with probability `exploration`
it is the first of its pool whatever its score*. Nothing is lost or starved: a prompt that always loses is still issued once in
`pool / exploration` epochs in the mean. A choice is a pure function of the place in the order and of the outcomes heard so far.

p is a posterior mean: rewards of the prompt's groups, their weight halved every `half_life` groups (of all prompts: it is the policy that
moves on), plus one sample's worth of the solve rate of all prompts. An unseen prompt is taken for an average one.
Evidence is counted in whole thousandths of a sample, so that a checkpoint (`state`) and a ledger on disk (`marks`) hold exactly what the
choice depends on. Each prompt that is remembered has a numbered slot, so that the marks are as bounded as the memory.

Left out: Goldilocks' teacher, a second model that predicts p of prompts that were never seen. Without it a curriculum needs prompts that
come back: where an epoch is longer than the run (a task with a million prompts) all candidates look alike, and the first is issued.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

_UNIT = 1000
"""Evidence of one sample."""
_PREFIX = "curriculum:"
_FIELDS = ("index", "solved", "total", "clock")
_ISSUED_SMOOTHING = 1 / 32
"""Weight of the newest prompt in the estimated solve rate of issued ones."""


class Kind(StrEnum):
    """How candidates are scored."""

    GOLDILOCKS = "goldilocks"
    """sqrt(p (1 - p))"""
    PACED = "paced"
    """A Beta kernel around a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumSettings:
    """As in the configuration (`buffer.curriculum_*`)."""

    kind: Kind
    pool: int = 4
    """Candidates of one choice."""
    target: float = 0.5
    """Of `paced`: the solve rate that is preferred."""
    exploration: float = 0.1
    """Share of choices that take the first candidate unseen."""
    memory: int = 16384
    """Prompts whose outcomes are remembered; the one heard of longest ago is forgotten first."""
    half_life: int = 1024
    """Complete groups after which an outcome counts half."""
    reward_low: float = 0.0
    """Reward that counts as a solve rate of 0."""
    reward_high: float = 1.0
    """Reward that counts as a solve rate of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evidence:
    slot: int
    """-1: of all prompts together."""
    index: int
    solved: int
    total: int
    clock: int
    """Complete groups when these were counted; no two prompts have the same."""


class Curriculum:
    """Hears of every complete group, chooses among candidates. Memory is bounded by `settings.memory`."""

    def __init__(self, settings: CurriculumSettings) -> None:
        self.settings = settings
        self._clock = 0
        self._all = _Evidence(slot=-1, index=-1, solved=_UNIT // 2, total=_UNIT, clock=0)
        self._of: OrderedDict[int, _Evidence] = OrderedDict()
        self.issued_solve_rate = 0.5
        """Estimated solve rate of the prompts issued of late, an exponential mean."""
        self.num_explored = 0
        """Choices in this life that took the first candidate unseen."""

    def choose(self, candidates: Sequence[int], *, luck: float) -> int:
        """The candidate to issue; `luck` in [0, 1) belongs to this choice and decides whether it explores."""
        explores = luck < self.settings.exploration
        self.num_explored += explores
        chosen = (
            candidates[0]
            if explores
            else max(candidates, key=lambda index: self._score(self.solve_rate(index)))
        )
        self.issued_solve_rate += _ISSUED_SMOOTHING * (self.solve_rate(chosen) - self.issued_solve_rate)
        return chosen

    def observe(self, index: int, rewards: Sequence[float]) -> dict[str, int]:
        """A group of this prompt is complete, whatever becomes of it: one without spread says most about a prompt.

        The marks that have changed.
        """
        low, high = self.settings.reward_low, self.settings.reward_high
        rates = [min(max((reward - low) / (high - low), 0.0), 1.0) for reward in rewards]
        solved, total = round(_UNIT * math.fsum(rates)), _UNIT * len(rates)
        self._clock += 1
        self._all = self._aged(self._all, solved, total)
        known = self._of.pop(index, None)
        if known is None:
            full = len(self._of) >= self.settings.memory
            slot = self._of.popitem(last=False)[1].slot if full else len(self._of)
            known = _Evidence(slot=slot, index=index, solved=0, total=0, clock=self._clock)
        self._of[index] = self._aged(known, solved, total)
        return _marks((self._all, self._of[index]))

    @property
    def mean_solve_rate(self) -> float:
        """Of all prompts, of late."""
        return self._all.solved / self._all.total

    def solve_rate(self, index: int) -> float:
        """Posterior mean of this prompt's."""
        evidence = self._of.get(index)
        if evidence is None:
            return self.mean_solve_rate
        weight = self._weight(evidence)
        return (weight * evidence.solved + _UNIT * self.mean_solve_rate) / (weight * evidence.total + _UNIT)

    def status(self) -> dict[str, float | str]:
        """For /status."""
        return {
            "kind": self.settings.kind.value,
            "solve_rate": round(self.mean_solve_rate, 4),
            "issued_solve_rate": round(self.issued_solve_rate, 4),
            "prompts_remembered": len(self._of),
            "choices_explored": self.num_explored,
        }

    def state(self) -> list[int]:
        """Everything that later choices depend on, bounded by `memory`."""
        flat = []
        for each in (self._all, *self._of.values()):
            flat += [each.index, each.solved, each.total, each.clock]
        return flat

    def marks(self) -> dict[str, int]:
        """The same, as names and numbers of which `observe` changes a few."""
        return _marks((self._all, *self._of.values()))

    def restore(self, state: Sequence[int]) -> None:
        """Goes on from `state`, with slots of its own: `marks` have to be written anew. Raises ValueError where it is not one."""
        rows = [tuple(state[at : at + 4]) for at in range(0, len(state) - 3, 4)]
        is_well_formed = bool(rows) and 4 * len(rows) == len(state) and rows[0][0] == -1 and rows[0][2] > 0
        if not is_well_formed or not all(
            0 <= solved <= total and 0 <= clock <= rows[0][3] for _, solved, total, clock in rows
        ):
            raise ValueError("not the state of a curriculum")
        self._clock = rows[0][3]
        told = sorted(
            (row for row in rows[1:] if row[2]), key=lambda row: row[3]
        )  # a cleared slot has no evidence
        newest = {index: (solved, total, clock) for index, solved, total, clock in told}
        kept = list(newest.items())[-self.settings.memory :]
        self._all = _Evidence(slot=-1, index=-1, solved=rows[0][1], total=rows[0][2], clock=self._clock)
        self._of = OrderedDict(
            (index, _Evidence(slot=slot, index=index, solved=solved, total=total, clock=clock))
            for slot, (index, (solved, total, clock)) in enumerate(kept)
        )

    def _score(self, solve_rate: float) -> float:
        if self.settings.kind is Kind.GOLDILOCKS:
            return math.sqrt(solve_rate * (1 - solve_rate))
        return float(
            solve_rate ** (2 * self.settings.target) * (1 - solve_rate) ** (2 * (1 - self.settings.target))
        )

    def _weight(self, evidence: _Evidence) -> float:
        return float(0.5 ** ((self._clock - evidence.clock) / self.settings.half_life))

    def _aged(self, evidence: _Evidence, solved: int, total: int) -> _Evidence:
        weight = self._weight(evidence)
        return replace(
            evidence,
            solved=round(weight * evidence.solved) + solved,
            total=round(weight * evidence.total) + total,
            clock=self._clock,
        )


def _marks(evidences: Iterable[_Evidence]) -> dict[str, int]:
    return {f"{_PREFIX}{each.slot}:{name}": getattr(each, name) for each in evidences for name in _FIELDS}


def marks_of(marks: Mapping[str, int]) -> dict[str, int]:
    """Those of a curriculum among a store's."""
    return {name: value for name, value in marks.items() if name.startswith(_PREFIX)}


def state_of(marks: Mapping[str, int]) -> list[int]:
    """The state that a curriculum's marks hold."""
    slots = sorted({int(name.split(":")[1]) for name in marks})
    return [marks[f"{_PREFIX}{slot}:{name}"] for slot in slots for name in _FIELDS]
