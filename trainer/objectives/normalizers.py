"""How per-token losses become one number: a setting of its own, so that no objective has it baked in.

A normaliser is a weight on each token's loss and a divisor that is only known when the step is over: sums are accumulated with the
weights, and everything is divided once at the end by the global divisor. A mean of micro-batch means would depend on the cuts.

Shape suffixes: S sampled tokens, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.objectives.base import SampledTokens, TokenLosses


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """One of `token_mean`, `seq_mean_token_mean`, `seq_mean_token_sum`, `constant` (Dr. GRPO)."""

    name: str
    max_tokens: int
    """L_max of `constant`: the limit of sampled tokens."""

    def weigh(self, losses: TokenLosses, batch: SampledTokens) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted losses [S], tokens that count, sequences that count); the counts as scalars."""
        if losses.counted_S is None:
            counted_N = batch.length_N
            num_seqs = counted_N.new_tensor(len(counted_N))
        else:
            counted_N = batch.sum_N(losses.counted_S.to(batch.length_N.dtype))
            num_seqs = (counted_N > 0).sum().to(counted_N.dtype)
        loss_S = losses.loss_S
        if self.name == "seq_mean_token_mean":
            loss_S = loss_S / batch.spread_S(counted_N.clamp(min=1))
        return loss_S, counted_N.sum(), num_seqs

    def divisor(self, *, num_tokens: float, num_seqs: float) -> float:
        """What the step's sum is divided by, from global counts; 1 where nothing counted."""
        divisor = {
            "token_mean": num_tokens,
            "seq_mean_token_mean": num_seqs,
            "seq_mean_token_sum": num_seqs,
            "constant": num_seqs * self.max_tokens,
        }[self.name]
        return divisor if divisor > 0 else 1.0
