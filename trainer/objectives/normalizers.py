"""Normalizers turn the per-token losses of a step into one number.

The normalizer is a separate setting rather than a part of each objective. It is a weight on each token's loss
and a divisor that is known only at the end of the step: weighted sums are accumulated, and the sum is divided
once by the global divisor. A mean of micro-batch means would depend on the cuts into micro-batches.

    token_mean            sum of losses / tokens
    seq_mean_token_mean   sum of each sample's mean loss / samples
    seq_mean_token_sum    sum of losses / samples
    constant              sum of losses / (samples * max_tokens), as in Dr. GRPO

A sample counts once, whatever the number of its segments. Tokens that are beyond the staleness bound and
therefore masked count like trained ones: divided by the trained tokens alone, the rest of a sample would gain
weight.

Shape suffixes: S sampled tokens, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.objectives.base import SampledTokens, TokenLosses


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Weights and divisor of one of the normalizations in the module's table."""

    name: str
    """`token_mean` | `seq_mean_token_mean` | `seq_mean_token_sum` | `constant`."""
    max_tokens: int
    """The limit of sampled tokens, used by `constant`."""

    def weigh(self, losses: TokenLosses, batch: SampledTokens) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted losses [S], tokens that count, samples that count); the counts as scalar tensors."""
        counted_N = batch.counted_N(losses.counted_S)
        if losses.counted_S is None and batch.num_masked_N is None:
            num_seqs = counted_N.new_full((), len(counted_N))  # `new_tensor` synchronizes with the GPU
        else:
            num_seqs = (counted_N > 0).sum().to(counted_N.dtype)
        loss_S = losses.loss_S
        if self.name == "seq_mean_token_mean":
            loss_S = loss_S / batch.spread_S(counted_N.clamp(min=1))
        return loss_S, counted_N.sum(), num_seqs

    def divisor(self, *, num_tokens: float, num_seqs: float) -> float:
        """The divisor of the step's sum, from counts over all ranks; 1 if nothing counts."""
        divisor = {
            "token_mean": num_tokens,
            "seq_mean_token_mean": num_seqs,
            "seq_mean_token_sum": num_seqs,
            "constant": num_seqs * self.max_tokens,
        }[self.name]
        return divisor if divisor > 0 else 1.0
