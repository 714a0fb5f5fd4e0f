"""Renders preference rows as units: pairs of completions, or single completions with labels.

    row -> comparisons or labels -> (row, completions) of each unit -> tokens

A ranking of k completions gives a unit for each of its pairs; ties give none. For single completions
(`Method.of_pairs` is False) the best completions of a row are desirable and the worst undesirable, and those
between them are left out.

At the start every unit is rendered once for its length and its digest, and each rank renders a share; only
these numbers stay in memory. A unit is rendered again in its step.

Shape suffixes: N units of the data set, C columns.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.data import Rows
from areal_like.data.preference_format import PreferenceFormat, PreferenceRow
from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.distributed.ranks import Ranks

log = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0
_ROW, _FIRST, _SECOND, _DESIRABLE, _TOKENS, _LEARNED, _TOO_LONG, _CUT, _NUM_COLUMNS = *range(8), 9
"""Columns of the facts about a unit; the last one is the digest of its tokens."""


@dataclass(frozen=True, kw_only=True)
class UnitCounts:
    """Counts of the units of one source by outcome."""

    num_rows: int
    """Number of rows of the source."""
    num_ties: int
    """Comparisons without a better completion, which give no unit."""
    num_units: int
    """Pairs, or completions with labels."""
    num_too_long: int
    """Units that are left out because they are longer than the limit."""
    num_truncated: int
    """Units that lost the end of a sequence."""
    num_without_target: int
    """Units that are left out because a completion has no learned token (after the truncation)."""
    num_tokens: int
    """Tokens of the units that are used."""
    num_learned: int
    """Learned tokens among them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One completion after its prompt."""

    sequences: tuple[TokenRow, ...]
    """One sequence, or several if the chat template renders earlier replies in another way."""
    is_desirable: bool
    """It is the chosen one of its pair, or has a good label."""
    ref_logp: float = 0.0
    """Log-prob of its learned tokens under the reference model."""

    def trajectory(self) -> Trajectory:
        """The completion in the form of the trainer's batches; fields of sampled tokens are zero."""
        mask = np.concatenate([np.asarray(row.loss_mask, dtype=np.uint8) for row in self.sequences])
        return Trajectory(
            tokens=np.concatenate([np.asarray(row.tokens, dtype=np.int32) for row in self.sequences]),
            loss_mask=mask,
            logprobs=np.zeros(len(mask), dtype=np.float32),
            versions=mask.astype(np.int32) - 1,
            reward=float(self.is_desirable),
            finish_reason=FinishReason.STOP,
            segments=tuple(len(row.tokens) for row in self.sequences) if len(self.sequences) > 1 else (),
        )


Unit = tuple[Completion, ...]
"""The chosen and the rejected completion of a pair, or one completion with a label."""


class PreferenceUnits:
    """The units of one source."""

    def __init__(
        self,
        rows: Rows,
        *,
        key: str,
        format: PreferenceFormat,
        tokens: ConversationTokens,
        longest: int,
        budget_tokens: int,
        truncates: bool,
        of_pairs: bool,
        ranks: Ranks,
    ) -> None:
        """Renders every unit once; each rank renders a share. Collective.

        `key`: the setting that names the source, for errors. `longest`: most tokens of a sequence;
        `budget_tokens`: most tokens of a unit. `truncates`: longer sequences are cut at their end; False:
        their units are left out. `of_pairs`: see `Method.of_pairs`.

        Raises ConfigError for a row that cannot be read or rendered, with its place, and if the ranks do not
        see the same rows.
        """
        self._rows, self._key, self._format, self._tokens = rows, key, format, tokens
        self._longest, self._budget, self._truncates = longest, budget_tokens, truncates
        self._of_pairs = of_pairs
        facts_NC, num_ties = self._measured(ranks)
        self._facts_NC = facts_NC
        self.num_tokens_N = np.where(facts_NC[:, _LEARNED] > 0, facts_NC[:, _TOKENS], 0)
        """Tokens of each unit; 0: the unit is left out."""
        is_used_N = self.num_tokens_N > 0
        self.is_desirable_N = facts_NC[:, _DESIRABLE].astype(bool)
        """bool: label of each unit; True for pairs."""
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(facts_NC).tobytes()).hexdigest()
        """Hash of the tokens of all units, in hexadecimal."""
        self.counts = UnitCounts(
            num_rows=len(rows),
            num_ties=num_ties,
            num_units=len(facts_NC),
            num_too_long=int(facts_NC[:, _TOO_LONG].sum()),
            num_truncated=int(facts_NC[is_used_N, _CUT].sum()),
            num_without_target=int((~is_used_N & (facts_NC[:, _TOO_LONG] == 0)).sum()),
            num_tokens=int(self.num_tokens_N.sum()),
            num_learned=int(facts_NC[is_used_N, _LEARNED].sum()),
        )
        if ranks.rank == 0:
            self._report()

    def unit(self, index: int) -> Unit:
        """The completions of a unit, cut to the limits. `index`: of one that is not left out."""
        row, first, second, is_desirable = (int(each) for each in self._facts_NC[index, : _DESIRABLE + 1])
        read = self._rows.read(row, self._format.read)
        made = (first,) if second < 0 else (first, second)
        sequences, _ = self._cut([self._rendered(row, read, at) for at in made])
        labels = (bool(is_desirable), False)
        return tuple(
            Completion(sequences=tuple(each), is_desirable=label)
            for each, label in zip(sequences, labels, strict=False)
        )

    def mismatched(self, index: int, other: int) -> Completion | None:
        """The prompt of a unit with the completion of another one, both of their first sequences; None if
        the prompt alone is as long as the limit.

        As in TRL, tokens are joined, not texts.
        """
        (before, *_), (after, *_) = (self.unit(each)[0].sequences for each in (index, other))
        prompt_end, completion_begin = (_first_learned(row) for row in (before, after))
        mask = [0] * prompt_end + list(after.loss_mask[completion_begin:])
        tokens = [*before.tokens[:prompt_end], *after.tokens[completion_begin:]]
        row = TokenRow(tokens=tokens, loss_mask=mask).cut(min(self._longest, self._budget))
        return Completion(sequences=(row,), is_desirable=False) if row.num_learned else None

    def _measured(self, ranks: Ranks) -> tuple[NDArray[np.int64], int]:
        """([N, C] facts about every unit in the order of the rows, number of ties)."""
        mine = int(self._rows.fingerprint[:12], 16)
        if ranks.any(ranks.agree(mine) != mine):
            raise ConfigError(f"{self._key}: the files on the trainer's machines differ: copy them again")
        share = range(ranks.rank, len(self._rows), ranks.world_size)
        facts: list[list[int]] = []
        broken, num_ties = -1, 0
        due_s = time.monotonic() + _LOG_INTERVAL_S
        for at, index in enumerate(share):
            try:
                found, ties = self._facts(index)
            except ConfigError:
                broken = index
                break
            facts += found
            num_ties += ties
            if time.monotonic() > due_s:
                log.info("%s: %d of %d rows are rendered", self._key, at * ranks.world_size, len(self._rows))
                due_s += _LOG_INTERVAL_S
        # If only one rank raised, the others would report that they had lost it.
        if failed := [index for index in ranks.gather(torch.tensor([broken])).tolist() if index >= 0]:
            self._facts(min(failed))
        flat = torch.tensor(facts, dtype=torch.int64).reshape(-1)
        everyone = ranks.gather(flat).numpy().reshape(-1, _NUM_COLUMNS)
        total_ties = ranks.sum(torch.tensor([num_ties]))
        # Each rank's part is in the order of its rows, and the sort keeps the order within a row.
        return everyone[np.argsort(everyone[:, _ROW], kind="stable")], int(total_ties)

    def _facts(self, index: int) -> tuple[list[list[int]], int]:
        """(facts about the units of a row, number of its ties)."""
        read = self._rows.read(index, self._read)
        made = units_of(read, of_pairs=self._of_pairs)
        rendered = {
            at: self._rendered(index, read, at) for at in sorted({at for unit, _ in made for at in unit})
        }
        facts = []
        for unit, is_desirable in made:
            sequences, is_cut = self._cut([rendered[at] for at in unit])
            learned = [sum(row.num_learned for row in each) for each in sequences]
            num_tokens = sum(len(row.tokens) for each in sequences for row in each)
            is_long = is_cut and not self._truncates
            first, second = (*unit, -1)[:2]
            num_learned = sum(learned) if min(learned) and not is_long else 0
            outcome = [is_long, is_cut and not is_long, _digest(sequences)]
            facts.append([index, first, second, is_desirable, num_tokens, num_learned, *outcome])
        return facts, read.num_ties

    def _read(self, row: dict[str, object]) -> PreferenceRow:
        read = self._format.read(row)
        if self._of_pairs and read.label is not None:
            raise ConfigError(
                "`label` is of one completion, and this method compares two: set preferences.method=kto"
            )
        return read

    def _rendered(self, index: int, read: PreferenceRow, at: int) -> list[TokenRow]:
        return self._rows.read(index, lambda _: self._tokens.rows(read.conversation(at)))

    def _cut(self, completions: Sequence[Sequence[TokenRow]]) -> tuple[list[list[TokenRow]], bool]:
        """(the sequences of each completion that have learned tokens, within the limits; any was cut)."""
        num_sequences = sum(map(len, completions))
        num_tokens = sum(len(row.tokens) for each in completions for row in each)
        limit = self._longest
        if num_tokens > self._budget:
            limit = min(limit, self._budget // num_sequences)
        cut = [[row.cut(limit) for row in each] for each in completions]
        is_cut = any(len(row.tokens) > limit for each in completions for row in each)
        return [[row for row in each if row.num_learned] for each in cut], is_cut

    def _report(self) -> None:
        counts = self.counts
        log.info("%s: %s", self._key, ", ".join(f"{name} {value}" for name, value in asdict(counts).items()))
        limits = f"{self._longest} tokens a sequence and {self._budget} of trainer.tokens_per_microbatch"
        for num, what in (
            (counts.num_too_long, f"are left out: they are longer than the limits, {limits}"),
            (counts.num_truncated, f"are cut to the limits, {limits}"),
            (counts.num_without_target, "are left out: a completion has no learned token"),
        ):
            if num:
                name = "pairs" if self._of_pairs else "completions"
                log.warning("%s: %d of %d %s %s", self._key, num, counts.num_units, name, what)


def units_of(row: PreferenceRow, *, of_pairs: bool) -> list[tuple[tuple[int, ...], bool]]:
    """(numbers of its completions, label) of each unit of a row: the chosen and the rejected completion of a
    pair, or one with its label."""
    levels = row.levels
    if of_pairs:
        ordered = [
            (left, right) if levels[left] > levels[right] else (right, left)
            for left, right in combinations(range(len(levels)), 2)
            if levels[left] != levels[right]
        ]
        return [(pair, True) for pair in ordered]
    if row.label is not None:
        return [((0,), row.label)]
    best, worst = max(levels), min(levels)
    if best == worst:
        return []
    return [((at,), level == best) for at, level in enumerate(levels) if level in (best, worst)]


def with_references(unit: Unit, ref_logps: Sequence[float]) -> Unit:
    """The unit with the log-probs of its completions under the reference model."""
    return tuple(replace(each, ref_logp=ref) for each, ref in zip(unit, ref_logps, strict=True))


def shares_of(num: int, ranks: Ranks) -> Iterator[int]:
    """This rank's share of `num` items of a step."""
    yield from range(ranks.rank, num, ranks.world_size)


def _first_learned(row: TokenRow) -> int:
    """The first learned token, which is not the first one of the sequence."""
    return next(at for at in range(1, len(row.tokens)) if row.loss_mask[at])


def _digest(sequences: Sequence[Sequence[TokenRow]]) -> int:
    """Hash of the tokens and masks of a unit, as an int64."""
    digest = hashlib.sha256()
    for completion in sequences:
        digest.update(len(completion).to_bytes(4, "little"))
        for row in completion:
            digest.update(len(row.tokens).to_bytes(4, "little"))
            digest.update(np.asarray(row.tokens, dtype="<i4").tobytes())
            digest.update(np.asarray(row.loss_mask, dtype=np.uint8).tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
