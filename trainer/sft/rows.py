"""The rows of a supervised run: conversations, of which the replies are learned.

Shape suffix: N rows of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.data import RowFormat
from trainer.distributed.ranks import Ranks
from trainer.offline.rows import OfflineRows, training_sample
from trainer.offline.step import Unit


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of the rows of one source by outcome."""

    num_rows: int
    """Number of rows of the source."""
    num_too_long: int
    """Rows that are left out because they are longer than the limit."""
    num_truncated: int
    """Rows that lost the end of a sequence."""
    num_without_target: int
    """Rows that are left out because none of their tokens is learned (after the truncation)."""
    num_tokens: int
    """Tokens of the rows that are used."""
    num_learned: int
    """Learned tokens among them."""


class SftRows(OfflineRows):
    """The rows of one source."""

    fact_names = ("num_tokens", "num_learned", "is_too_long", "is_truncated")

    def __init__(
        self,
        config: Config,
        source: str | Sequence[str],
        *,
        key: str,
        tokens: ConversationTokens,
        longest: int,
        ranks: Ranks,
    ) -> None:
        """As `OfflineRows`. `longest`: most tokens of a sequence."""
        settings = config.sft
        self._format = RowFormat(
            prompt_key=settings.prompt_key,
            completion_key=settings.completion_key,
            messages_key=settings.messages_key,
            system_prompt=settings.system_prompt,
            chat=settings.chat,
        )
        self._tokens = tokens
        self._longest = longest
        self._truncates = settings.long_rows == "truncate"
        super().__init__(source, key=key, ranks=ranks)

    @property
    def num_tokens_N(self) -> NDArray[np.int64]:
        return np.where(self.facts["num_learned"] > 0, self.facts["num_tokens"], 0)

    @property
    def counts(self) -> RowCounts:
        facts, is_used_N = self.facts, self.num_tokens_N > 0
        return RowCounts(
            num_rows=len(is_used_N),
            num_too_long=int(facts["is_too_long"].sum()),
            num_truncated=int(facts["is_truncated"].sum()),
            num_without_target=int((~is_used_N & (facts["is_too_long"] == 0)).sum()),
            num_tokens=int(self.num_tokens_N.sum()),
            num_learned=int(facts["num_learned"][is_used_N].sum()),
        )

    def units(self, index: int, *, group: int = 0) -> list[Unit]:
        return [[training_sample(row)] for row in self.sequences(index)]

    def sequences(self, index: int) -> list[TokenRow]:
        """The sequences of a row that have tokens to learn, cut to the limit."""
        return self._cut(self._rendered(index))

    def _rendered(self, index: int) -> list[TokenRow]:
        return self._rows.read(index, lambda row: self._tokens.rows(self._format.conversation_of(row)))

    def _cut(self, rendered: list[TokenRow]) -> list[TokenRow]:
        return [row for row in (row.cut(self._longest) for row in rendered) if row.num_learned]

    def _facts(self, index: int) -> tuple[int, int, int, int]:
        rendered = self._rendered(index)
        is_long = any(len(row.tokens) > self._longest for row in rendered)
        if is_long and not self._truncates:
            return 0, 0, 1, 0
        kept = self._cut(rendered)
        return sum(len(row.tokens) for row in kept), sum(row.num_learned for row in kept), 0, int(is_long)

    def _problem(self) -> str:
        is_measured = self._key.endswith(".eval")
        return (
            ""
            if self.counts.num_learned or not is_measured
            else "no row is left whose loss could be measured"
        )

    def _warnings(self) -> Iterator[tuple[int, str]]:
        counts = self.counts
        yield counts.num_too_long, f"are left out: they have sequences of more than {self._longest} tokens"
        yield counts.num_truncated, f"are cut to {self._longest} tokens a sequence"
        yield counts.num_without_target, "are left out: none of their tokens is learned"
