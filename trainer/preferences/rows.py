"""The rows of preference optimization: completions of one prompt with levels, of which the higher is better.

A method of pairs learns from every comparison of a row that has a better completion: one of a pair, k (k - 1)
/ 2 of a ranking without ties. A method of single completions (KTO) takes labelled ones, and of other rows the
best completions as desirable and the worst as undesirable ones; those between them are left out.

Each completion carries its log-prob under the reference model, which is computed before training
(`reference.py`), and so do the mismatched completions from which KTO's KL is estimated: every completion of a
row after the prompt of the next row of its step. Their tokens are joined, not their texts, as in TRL.

Shape suffixes: N rows of the data set, Q positions in the sequence of all epochs' rows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.data.preference_format import PreferenceFormat, PreferenceRow
from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.offline.plan import StepPlan
from trainer.offline.rows import OfflineRows
from trainer.offline.step import Unit
from trainer.preferences.losses import rotated
from trainer.preferences.reference import Reference


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of the rows of one source by outcome."""

    num_rows: int
    """Number of rows of the source."""
    num_completions: int
    """Completions that are used."""
    num_pairs: int
    """Comparisons that are used; 0 for a method of single completions."""
    num_ties: int
    """Comparisons without a better completion, which are not used."""
    num_too_long: int
    """Rows that are left out because they are longer than the limit."""
    num_without_target: int
    """Rows that are left out because they have only ties, or a completion without a learned token."""
    num_tokens: int
    """Tokens of the rows that are used."""
    num_learned: int
    """Learned tokens among them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One completion after a prompt."""

    sequences: Sequence[TokenRow]
    """One sequence, or several if the chat template renders earlier replies in another way."""
    level: float = 0.0
    """The higher one of a row is better; 1 for a desirable completion, 0 for an undesirable one."""

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.sequences)

    @property
    def num_learned(self) -> int:
        return sum(row.num_learned for row in self.sequences)

    def trajectory(self) -> Trajectory:
        """The completion in the form of the trainer's batches; fields of sampled tokens are zero."""
        mask = np.concatenate([np.asarray(row.loss_mask, dtype=np.uint8) for row in self.sequences])
        return Trajectory(
            tokens=np.concatenate([np.asarray(row.tokens, dtype=np.int32) for row in self.sequences]),
            loss_mask=mask,
            logprobs=np.zeros(len(mask), dtype=np.float32),
            versions=mask.astype(np.int32) - 1,
            reward=self.level,
            finish_reason=FinishReason.STOP,
            segments=tuple(len(row.tokens) for row in self.sequences) if len(self.sequences) > 1 else (),
        )


class PreferenceRows(OfflineRows):
    """The rows of one source."""

    fact_names = (
        *("num_completions", "num_pairs", "num_ties", "num_tokens", "num_learned", "num_chosen_tokens"),
        *("is_too_long", "digest"),
    )

    def __init__(
        self,
        config: Config,
        source: str | Sequence[str],
        *,
        key: str,
        tokens: ConversationTokens,
        longest: int,
        of_pairs: bool,
        ranks: Ranks,
    ) -> None:
        """As `OfflineRows`. `longest`: most tokens of a sequence. `of_pairs`: see `Method.of_pairs`."""
        settings = config.preferences
        self._format = PreferenceFormat(
            prompt_key=settings.prompt_key,
            chosen_key=settings.chosen_key,
            rejected_key=settings.rejected_key,
            system_prompt=settings.system_prompt,
            chat=settings.chat,
        )
        self._tokens, self._of_pairs = tokens, of_pairs
        self._longest, self._budget = longest, config.trainer.tokens_per_microbatch
        self._drops = settings.long_rows == "drop"
        super().__init__(source, key=key, ranks=ranks)
        self._starts_N = np.cumsum(self.facts["num_completions"]) - self.facts["num_completions"]
        self._ref_logp = np.zeros(int(self.facts["num_completions"].sum()))
        self._mismatched_ref: list[NDArray[np.float64]] = []
        self._groups = itertools.count(1)

    @property
    def num_tokens_N(self) -> NDArray[np.int64]:
        return self.facts["num_tokens"]

    @property
    def counts(self) -> RowCounts:
        facts, is_used_N = self.facts, self.num_tokens_N > 0
        return RowCounts(
            num_rows=len(is_used_N),
            num_completions=int(facts["num_completions"].sum()),
            num_pairs=int(facts["num_pairs"].sum()),
            num_ties=int(facts["num_ties"].sum()),
            num_too_long=int(facts["is_too_long"].sum()),
            num_without_target=int((~is_used_N & (facts["is_too_long"] == 0)).sum()),
            num_tokens=int(facts["num_tokens"].sum()),
            num_learned=int(facts["num_learned"].sum()),
        )

    def units(self, index: int) -> list[Unit]:
        """The completions of a row: one unit, or one each for a method of single completions.

        `reward` of a sample is the completion's level, `advantage` its log-prob under the reference model.
        """
        start = self._starts_N[index]
        group = next(self._groups)  # not the index: a step over the end of an epoch may have a row twice
        samples = [
            TrainingSample(
                trajectory=completion.trajectory(), advantage=float(self._ref_logp[start + at]), group=group
            )
            for at, completion in enumerate(self.completions(index))
        ]
        return [samples] if self._of_pairs else [[sample] for sample in samples]

    def completions(self, index: int) -> list[Completion]:
        """The completions of a row that are used."""
        return self._rows.read(index, self._rendered)[1]

    def mismatched(self, index: int, other: int) -> list[Completion | None]:
        """The completions of row `other` after the prompt of row `index`, all of their first sequences; None
        for one that has no room after the prompt."""
        ((before, *_), *_) = (each.sequences for each in self.completions(index))
        prompt_end = _first_learned(before)
        found: list[Completion | None] = []
        for completion in self.completions(other):
            after, *_ = completion.sequences
            begin = _first_learned(after)
            row = TokenRow(
                tokens=[*before.tokens[:prompt_end], *after.tokens[begin:]],
                loss_mask=[*[0] * prompt_end, *after.loss_mask[begin:]],
            ).cut(self._longest)
            found.append(Completion(sequences=[row]) if row.num_learned else None)
        return found

    def read_reference(self, reference: Reference, plan: StepPlan | None, *, with_mismatched: bool) -> None:
        """Gets the log-probs of all completions under the reference model. Collective.

        `plan`: of the steps; None: held-out rows, which are measured all at once. `with_mismatched`: also of
        the mismatched completions.
        """
        counts_N = self.facts["num_completions"]
        digest = hashlib.sha256(np.ascontiguousarray(self.facts["digest"]).tobytes()).hexdigest()
        self._ref_logp = reference.logps(counts_N, self.completions, content=digest, what=self._key)
        if not with_mismatched:
            return
        steps = [self.usable] if plan is None else [plan.rows(step) for step in range(plan.num_steps)]
        pairs_Q = np.array([pair for rows in steps for pair in mismatched_pairs(rows)]).reshape(-1, 2)
        flat = reference.logps(
            counts_N[pairs_Q[:, 1]],
            lambda at: self.mismatched(int(pairs_Q[at, 0]), int(pairs_Q[at, 1])),
            content=hashlib.sha256(digest.encode() + pairs_Q.astype("<i8").tobytes()).hexdigest(),
            what=f"mismatched completions of {self._key}",
        )
        each_Q = np.split(flat, np.cumsum(counts_N[pairs_Q[:, 1]])[:-1])
        by_step = iter(each_Q)
        self._mismatched_ref = [
            np.concatenate([next(by_step) for _ in rows]) if rows else np.zeros(0) for rows in steps
        ]

    @property
    def usable(self) -> list[int]:
        """Indices of the rows that are not left out."""
        return [int(index) for index in np.flatnonzero(self.num_tokens_N)]

    def mismatched_share(
        self, indices: Sequence[int], *, step: int | None, ranks: Ranks
    ) -> Iterator[tuple[Completion, float]]:
        """This rank's mismatched completions of a step (None: of the held-out rows), each with its log-prob
        under the reference model. `indices`: the rows of the step, over all ranks."""
        pairs = mismatched_pairs(indices)
        counts = self.facts["num_completions"][[other for _, other in pairs]]
        starts = np.cumsum(counts) - counts
        ref = self._mismatched_ref[step or 0]
        for at in range(ranks.rank, len(pairs), ranks.world_size):
            for offset, completion in enumerate(self.mismatched(*pairs[at])):
                if completion is not None:
                    yield completion, float(ref[starts[at] + offset])

    def _facts(self, index: int) -> tuple[int, ...]:
        read, completions = self._rows.read(index, self._rendered)
        num_ties = read.num_ties
        num_tokens = sum(each.num_tokens for each in completions)
        longest = max((len(row.tokens) for each in completions for row in each.sequences), default=0)
        # The completions of a pair are in one micro-batch.
        together = num_tokens if self._of_pairs else max((each.num_tokens for each in completions), default=0)
        if longest > self._longest or together > self._budget:
            if not self._drops:
                raise ConfigError(
                    f"{self._rows.place(index)}: it has {together} tokens, and {longest} in one sequence; the "
                    f"limits are {self._budget} and {self._longest}: raise trainer.tokens_per_microbatch or "
                    "preferences.max_row_tokens, or leave such rows out with preferences.long_rows=drop"
                )
            return (0, 0, num_ties, 0, 0, 0, 1, 0)
        if not completions or not all(each.num_learned for each in completions):
            return (0, 0, num_ties, 0, 0, 0, 0, 0)
        best = max(each.level for each in completions)
        return (
            len(completions),
            read.num_pairs - num_ties if self._of_pairs else 0,
            num_ties,
            num_tokens,
            sum(each.num_learned for each in completions),
            sum(each.num_learned for each in completions if each.level == best),
            0,
            _digest(completions),
        )

    def _check_facts(self) -> None:
        if self._key == "preferences.eval" and not self.num_tokens_N.any():
            raise ConfigError("preferences.eval: no row is left that could be measured")

    def _warnings(self) -> Iterator[tuple[int, str]]:
        counts = self.counts
        yield counts.num_too_long, f"are left out: they have sequences of more than {self._longest} tokens"
        yield counts.num_without_target, "are left out: they have only ties, or nothing is learned"

    def _rendered(self, row: dict[str, object]) -> tuple[PreferenceRow, list[Completion]]:
        """The row, and its completions that are used."""
        read = self._format.read(row)
        if self._of_pairs and read.label is not None:
            raise ConfigError(
                "`label` is of one completion, and preferences.method compares two: set preferences.method=kto"
            )
        completions = []
        for at, level in used_completions(read, of_pairs=self._of_pairs):
            sequences = [one for one in self._tokens.rows(read.conversation(at)) if one.num_learned]
            completions.append(Completion(sequences=sequences, level=level))
        return read, completions


def used_completions(row: PreferenceRow, *, of_pairs: bool) -> list[tuple[int, float]]:
    """(number, level) of the completions of a row that are used; none of a row that has only ties.

    For single completions the level is 1 or 0, the label.
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


def mismatched_pairs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(row of the prompt, row of the completions) for each row of a step."""
    return [(rows[at], rows[other]) for at, other in enumerate(rotated(len(rows)))]


def _first_learned(row: TokenRow) -> int:
    """The first learned token, which is not the first one of the sequence."""
    return next(at for at in range(1, len(row.tokens)) if row.loss_mask[at])


def _digest(completions: Sequence[Completion]) -> int:
    """Hash of the tokens of a row and their masks, as an int64."""
    digest = hashlib.sha256()
    for completion in completions:
        digest.update(len(completion.sequences).to_bytes(4, "little"))
        for row in completion.sequences:
            digest.update(len(row.tokens).to_bytes(4, "little"))
            digest.update(np.asarray(row.tokens, dtype="<i4").tobytes())
            digest.update(np.asarray(row.loss_mask, dtype=np.uint8).tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
