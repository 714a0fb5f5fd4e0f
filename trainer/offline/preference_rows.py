"""The rows of a run that learns from preferences: completions of a prompt, and which of them is better.

The completions of a row are one unit, so they are compared within a micro-batch, and the prompt that they
have in common is computed once. In a batch, `rewards_N` holds the level of each completion, `groups_N` its
row, and `advantages_T` the row's margin. `comparisons` finds the pairs again.

Shape suffixes: N rows of the data set; in a batch, N completions, P pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import PreferencesConfig
from areal_like.data.preference_format import PreferenceFormat, PreferenceRow
from areal_like.errors import ConfigError
from trainer.batching.device_copies import copied
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.offline.rows import OfflineRows, training_sample
from trainer.offline.step import Unit

Render = Callable[[PreferenceRow, int], TokenRow]
"""The tokens of a row's prompt with one of its completions, and which of them the loss uses. Raises
ConfigError."""
_NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class PreferenceCounts:
    """Counts of the rows of one source."""

    num_rows: int
    """Number of rows of the source."""
    num_too_long: int
    """Rows that are left out because they are longer than the limit."""
    num_pairs: int
    """Comparisons of two completions in the rows that are used; a ranking of n has n (n - 1) / 2."""
    num_ties: int
    """Those of them without a better completion."""
    num_labels: int
    """Completions with a label of their own."""
    num_tokens: int
    """Tokens of the rows that are used."""


class PreferenceRows(OfflineRows):
    """The rows of one source."""

    fact_names: tuple[str, ...] = ("num_tokens", "num_pairs", "num_ties", "is_too_long", "label", "digest")

    def __init__(
        self,
        settings: PreferencesConfig,
        source: str | Sequence[str],
        *,
        key: str,
        render: Render,
        longest: int,
        budget_tokens: int,
        ranks: Ranks,
        takes_pairs: bool = True,
        takes_labels: bool = False,
    ) -> None:
        """As `OfflineRows`. `longest`: most tokens of a sequence; `budget_tokens`: of a row with all its
        completions. `takes_pairs`, `takes_labels`: whether rows with comparisons, and completions with a
        label of their own, are accepted; any other row is refused."""
        self._settings = settings
        self._format = PreferenceFormat(
            prompt_key=settings.prompt_key,
            chosen_key=settings.chosen_key,
            rejected_key=settings.rejected_key,
            system_prompt=settings.system_prompt,
            chat=settings.chat,
        )
        self._render = render
        self._longest, self._budget_tokens = longest, budget_tokens
        self._takes_pairs, self._takes_labels = takes_pairs, takes_labels
        super().__init__(source, key=key, ranks=ranks)

    @property
    def num_tokens_N(self) -> NDArray[np.int64]:
        return self.facts["num_tokens"]

    @property
    def counts(self) -> PreferenceCounts:
        facts = self.facts
        return PreferenceCounts(
            num_rows=len(facts["num_tokens"]),
            num_too_long=int(facts["is_too_long"].sum()),
            num_pairs=int(facts["num_pairs"].sum()),
            num_ties=int(facts["num_ties"].sum()),
            num_labels=int((facts["label"] != _NO_LABEL).sum()),
            num_tokens=int(facts["num_tokens"].sum()),
        )

    def units(self, index: int, *, group: int = 0) -> list[Unit]:
        row, rendered = self._read(index)
        return [
            [
                training_sample(tokens, value=level, margin=row.margin, group=group)
                for tokens, level in zip(rendered, row.levels, strict=True)
            ]
        ]

    def _read(self, index: int) -> tuple[PreferenceRow, list[TokenRow]]:
        def rendered(values: dict[str, object]) -> tuple[PreferenceRow, list[TokenRow]]:
            row = self._format.read(values)
            if row.label is None and not self._takes_pairs:
                raise ConfigError("it compares completions: want `completion` with `label`")
            if row.label is not None and not self._takes_labels:
                raise ConfigError("it has one completion with a label: want completions that are compared")
            return row, [self._render(row, at) for at in range(len(row.completions))]

        return self._rows.read(index, rendered)

    def _facts(self, index: int) -> tuple[int, ...]:
        row, rendered = self._read(index)
        longest, total = (f([len(tokens.tokens) for tokens in rendered]) for f in (max, sum))
        if longest > self._longest or total > self._budget_tokens:
            if self._settings.long_rows == "drop":
                return 0, 0, 0, 1, _NO_LABEL, 0
            raise ConfigError(f"{self._rows.place(index)}: {self._too_long(longest, total)}")
        label = _NO_LABEL if row.label is None else int(row.label)
        return total, row.num_pairs, row.num_ties, 0, label, _digest(row)

    def _too_long(self, longest: int, total: int) -> str:
        drop = f"or {self._settings.key}.long_rows=drop leaves such rows out"
        if longest > self._longest:
            return (
                f"a completion with its prompt has {longest} tokens, and at most {self._longest} fit (of the "
                f"model's context, {self._settings.key}.max_row_tokens and trainer.tokens_per_microbatch); "
                f"{drop}"
            )
        return (
            f"its completions have {total} tokens together, and are compared in one micro-batch: set "
            f"trainer.tokens_per_microbatch={total}; {drop}"
        )

    def _problem(self) -> str:
        counts, facts = self.counts, self.facts
        if counts.num_pairs and counts.num_pairs == counts.num_ties and not counts.num_labels:
            first = self._rows.place(int(np.flatnonzero(facts["num_ties"])[0]))
            return f"every comparison is a tie, so there is nothing to learn; the first one: {first}"
        if self._key.endswith(".eval") and not counts.num_tokens:
            return "no row is left that could be measured"
        labelled = np.flatnonzero(facts["label"] != _NO_LABEL)
        order = labelled[np.argsort(facts["digest"][labelled], kind="stable")]
        digests, labels = facts["digest"][order], facts["label"][order]
        conflicts = np.flatnonzero((digests[1:] == digests[:-1]) & (labels[1:] != labels[:-1]))
        if len(conflicts):
            first, second = (self._rows.place(int(at)) for at in order[conflicts[0] :][:2])
            return f"{first} and {second} have the same prompt and completion, and different labels"
        return ""

    def _warnings(self) -> Iterator[tuple[int, str]]:
        counts = self.counts
        yield counts.num_too_long, f"are left out: they have sequences of more than {self._longest} tokens"


def _digest(row: PreferenceRow) -> int:
    """63 bits over the prompt and a single completion; 0 for a row with comparisons."""
    if row.label is None:
        return 0
    text = json.dumps([row.prompt, row.completions[0], row.tools], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def completion_tokens(tokens: ConversationTokens) -> Render:
    """Renders a completion for a language model; the loss uses its tokens, with the one that ends it."""

    def render(row: PreferenceRow, at: int) -> TokenRow:
        rendered = tokens.rows(row.conversation(at))
        if len(rendered) > 1:
            raise ConfigError(
                "the chat template changes earlier messages of a completion with several replies, so its "
                "probability is not one number: give the last reply as the completion"
            )
        if not rendered[0].num_learned:
            raise ConfigError("the chat template leaves out the completion")
        return rendered[0]

    return render


class Comparisons(NamedTuple):
    """The pairs of a batch: each two completions of the same row."""

    better_P: Tensor
    """int64 index of the better completion, or of the first one of a tie."""
    worse_P: Tensor
    """int64"""
    is_tie_P: Tensor
    """bool"""
    margin_P: Tensor
    """float64 margin of the row."""


def comparisons(batch: PackedBatch, *, with_ties: bool = True) -> Comparisons:
    """All pairs of completions of the same row in a batch that `collate` made. `with_ties`: False leaves out
    those without a better one."""
    # On the host: a GPU would have to wait for their number.
    group_N = np.array([sample.group for sample in batch.samples])
    level_N = np.array([sample.trajectory.reward for sample in batch.samples])
    first_P, second_P = np.triu_indices(batch.num_samples, k=1)
    is_kept_P = group_N[first_P] == group_N[second_P]
    if not with_ties:
        is_kept_P &= level_N[first_P] != level_N[second_P]
    first_P, second_P = first_P[is_kept_P], second_P[is_kept_P]
    is_swapped_P = level_N[first_P] < level_N[second_P]
    better_P, worse_P, is_tie_P = copied(
        [
            np.where(is_swapped_P, second_P, first_P),
            np.where(is_swapped_P, first_P, second_P),
            level_N[first_P] == level_N[second_P],
        ],
        batch.tokens_T.device,
    )
    return Comparisons(
        better_P=better_P, worse_P=worse_P, is_tie_P=is_tie_P, margin_P=margins(batch)[better_P]
    )


def margins(batch: PackedBatch) -> Tensor:
    """float64 [N] margin of each completion's row."""
    first_N = torch.searchsorted(
        batch.samples_T, torch.arange(batch.num_samples, device=batch.samples_T.device)
    )
    return batch.advantages_T[first_N]
