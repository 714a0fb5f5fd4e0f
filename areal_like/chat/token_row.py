"""A sequence of tokens, some of which are learned: the input of supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One sequence."""

    tokens: Sequence[int]
    loss_mask: Sequence[int]
    """1 where the token is learned, else 0."""

    @property
    def num_learned(self) -> int:
        """Number of learned tokens. The first token of a sequence has no prefix, so it is never learned."""
        return sum(self.loss_mask[1:])

    def cut(self, num_tokens: int) -> TokenRow:
        return TokenRow(tokens=self.tokens[:num_tokens], loss_mask=self.loss_mask[:num_tokens])
