"""The rows of preference optimization, each completion with its log-prob under the reference model.

A method of pairs learns from every comparison of a row that has a better completion. A method of single
completions (KTO) takes labelled ones, and of other rows the best completions as desirable and the worst as
undesirable ones; those between them are left out.

KTO estimates a KL from mismatched completions: those of a row after the prompt of the next row of its step.
Their tokens are joined, not their texts, as in TRL. A step of a single row, such as the last one of a run may
be, has none: its KL counts as 0. (TRL takes the row's own completion, whose KL is its implicit reward.)

Shape suffixes: N rows of the data set, Q positions in the sequence of all epochs' rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.chat.token_row import TokenRow
from areal_like.data.preference_format import PreferenceRow
from trainer.distributed.ranks import Ranks
from trainer.offline.plan import StepPlan
from trainer.offline.preference_rows import PreferenceCounts, PreferenceRows
from trainer.offline.rows import training_sample
from trainer.offline.step import Unit
from trainer.preferences.losses import rotated
from trainer.preferences.reference import Reference


@dataclass(frozen=True, kw_only=True)
class OptimizationCounts(PreferenceCounts):
    """Counts of the rows of one source."""

    num_without_target: int
    """Rows that are left out because they have only ties."""
    num_completions: int
    """Completions that are used."""
    num_desirable: int
    """Those of them that are labelled good; 0 for a method that compares completions."""
    num_learned: int
    """Learned tokens of the completions that are used."""


class OptimizationRows(PreferenceRows):
    """The rows of one source."""

    fact_names = (
        *PreferenceRows.fact_names,
        *("num_completions", "num_desirable", "num_better", "num_learned", "num_best_tokens"),
        "tokens_digest",
    )

    def __init__(self, *args: Any, of_pairs: bool, ranks: Ranks, **settings: Any) -> None:
        """As `PreferenceRows`. `of_pairs`: the method compares completions."""
        self._of_pairs = of_pairs
        self._last: tuple[int, tuple[PreferenceRow, list[TokenRow]]] | None = None
        super().__init__(*args, ranks=ranks, takes_labels=not of_pairs, **settings)
        counts_N = self.facts["num_completions"]
        self._starts_N = np.cumsum(counts_N) - counts_N
        self._ref_logp = np.zeros(int(counts_N.sum()))
        self._mismatched_ref: list[NDArray[np.float64]] = []

    @property
    def num_tokens_N(self) -> NDArray[np.int64]:
        return np.where(self.facts["num_completions"] > 0, self.facts["num_tokens"], 0)

    @property
    def counts(self) -> OptimizationCounts:
        facts, of_base = self.facts, asdict(super().counts)
        of_base["num_tokens"] = int(self.num_tokens_N.sum())
        has_none = (facts["num_completions"] == 0) & (facts["is_too_long"] == 0)
        return OptimizationCounts(
            **of_base,
            num_without_target=int(has_none.sum()),
            num_completions=int(facts["num_completions"].sum()),
            num_desirable=int(facts["num_desirable"].sum()),
            num_learned=int(facts["num_learned"].sum()),
        )

    def units(self, index: int, *, group: int = 0) -> list[Unit]:
        """The completions of a row: one unit, or one each for a method of single completions.

        In a batch, `rewards_N` holds the level of each completion, `advantages_T` its log-prob under the
        reference model, and `groups_N` counts from 1.
        """
        start = self._starts_N[index]
        samples = [
            training_sample(tokens, value=level, margin=float(self._ref_logp[start + at]), group=group + 1)
            for at, (tokens, level) in enumerate(self._used(index))
        ]
        return [samples] if self._of_pairs else [[sample] for sample in samples]

    def completions(self, index: int) -> list[TokenRow]:
        """The completions of a row that are used, each after the prompt."""
        return [tokens for tokens, _ in self._used(index)]

    def mismatched(self, index: int, other: int) -> list[TokenRow | None]:
        """The completions of row `other` after the prompt of row `index`; None for one that has no room
        there."""
        before, *_ = self.completions(index)
        prompt_end = _first_learned(before)
        found: list[TokenRow | None] = []
        for after in self.completions(other):
            begin = _first_learned(after)
            row = TokenRow(
                tokens=[*before.tokens[:prompt_end], *after.tokens[begin:]],
                loss_mask=[*[0] * prompt_end, *after.loss_mask[begin:]],
            ).cut(self._longest)
            found.append(row if row.num_learned else None)
        return found

    def read_reference(self, reference: Reference, plan: StepPlan | None, *, with_mismatched: bool) -> None:
        """Gets the log-probs of all completions under the reference model. Collective.

        `plan`: of the steps; None: held-out rows, which are measured all at once. `with_mismatched`: also of
        the mismatched completions.
        """
        counts_N = self.facts["num_completions"]
        digest = hashlib.sha256(np.ascontiguousarray(self.facts["tokens_digest"]).tobytes()).hexdigest()
        self._ref_logp = reference.logps(counts_N, self.completions, content=digest, what=self._key)
        if not with_mismatched:
            return
        usable = [int(index) for index in np.flatnonzero(self.num_tokens_N)]
        steps = [usable] if plan is None else [plan.rows(step) for step in range(plan.num_steps)]
        of_steps = [_mismatched_pairs(rows) for rows in steps]
        pairs_Q = np.array([pair for pairs in of_steps for pair in pairs], dtype=np.int64).reshape(-1, 2)
        counts_Q = counts_N[pairs_Q[:, 1]]
        flat = np.zeros(0)
        if len(pairs_Q):
            flat = reference.logps(
                counts_Q,
                lambda at: self.mismatched(int(pairs_Q[at, 0]), int(pairs_Q[at, 1])),
                content=hashlib.sha256(
                    f"{digest} {self._longest} ".encode() + pairs_Q.astype("<i8").tobytes()
                ).hexdigest(),
                what=f"mismatched completions of {self._key}",
            )
        by_position = iter(np.split(flat, np.cumsum(counts_Q)[:-1]))
        self._mismatched_ref = [
            np.concatenate([np.zeros(0), *(next(by_position) for _ in pairs)]) for pairs in of_steps
        ]

    def mismatched_share(
        self, indices: Sequence[int], *, step: int | None, ranks: Ranks
    ) -> Iterator[tuple[TokenRow, float]]:
        """This rank's mismatched completions of a step (None: of the held-out rows), each with its log-prob
        under the reference model. `indices`: the rows of the step, over all ranks."""
        pairs = _mismatched_pairs(indices)
        counts = self.facts["num_completions"][[other for _, other in pairs]]
        starts, ref = np.cumsum(counts) - counts, self._mismatched_ref[step or 0]
        for at in ranks.share_of(len(pairs)):
            for offset, tokens in enumerate(self.mismatched(*pairs[at])):
                if tokens is not None:
                    yield tokens, float(ref[starts[at] + offset])

    def _read(self, index: int) -> tuple[PreferenceRow, list[TokenRow]]:
        if self._last is None or self._last[0] != index:  # `_facts` reads a row twice
            self._last = index, super()._read(index)
        return self._last[1]

    def _used(self, index: int) -> list[tuple[TokenRow, float]]:
        """The completions of a row that are used, with their levels."""
        row, rendered = self._read(index)
        return [(rendered[at], level) for at, level in used_completions(row, of_pairs=self._of_pairs)]

    def _facts(self, index: int) -> tuple[int, ...]:
        of_base = super()._facts(index)
        used = self._used(index)
        if not of_base[0] or not used:
            return (*of_base, 0, 0, 0, 0, 0, 0)
        best = max(level for _, level in used)
        return (
            *of_base,
            len(used),
            0 if self._of_pairs else sum(level > 0 for _, level in used),
            of_base[1] - of_base[2],
            sum(tokens.num_learned for tokens, _ in used),
            sum(tokens.num_learned for tokens, level in used if level == best),
            _digest(used),
        )

    def _warnings(self) -> Iterator[tuple[int, str]]:
        yield from super()._warnings()
        yield self.counts.num_without_target, "are left out: they have only ties"


def used_completions(row: PreferenceRow, *, of_pairs: bool) -> list[tuple[int, float]]:
    """(number, level) of the completions of a row that are used; none of a row that has only ties.

    For a method of single completions the level is 1 or 0, the label.
    """
    levels = row.levels
    best, worst = max(levels), min(levels)
    if row.label is not None:
        return [(0, levels[0])]
    if best == worst:
        return []
    if of_pairs:
        return list(enumerate(levels))
    return [(at, float(level == best)) for at, level in enumerate(levels) if level in (best, worst)]


def _mismatched_pairs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(row of the prompt, row of the completions) for each row of a step; a row alone has no other's
    completions."""
    if len(rows) == 1:
        return []
    return [(rows[at], rows[other]) for at, other in enumerate(rotated(len(rows)))]


def _first_learned(row: TokenRow) -> int:
    """The first learned token, which is not the first one of the sequence."""
    return next(at for at in range(1, len(row.tokens)) if row.loss_mask[at])


def _digest(used: Sequence[tuple[TokenRow, float]]) -> int:
    """Hash of the tokens of a row and their masks, as an int64."""
    digest = hashlib.sha256()
    for tokens, _ in used:
        digest.update(len(tokens.tokens).to_bytes(4, "little"))
        digest.update(np.asarray(tokens.tokens, dtype="<i4").tobytes())
        digest.update(np.asarray(tokens.loss_mask, dtype=np.uint8).tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
