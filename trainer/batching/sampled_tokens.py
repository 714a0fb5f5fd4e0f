"""The sampled tokens of one micro-batch with their log-probs: the input of every objective.

Prompt and tool tokens are left out, so an objective cannot train on them by mistake. All masks of tokens,
from the data to the loss:

| mask | tokens (`mask`, `cap`, `ratio`: values of `staleness.beyond`) | made in |
|---|---|---|
| `Trajectory.loss_mask` | sampled by the policy, or learned by supervised training | data |
| `is_target` | of these, those that are trained on: they have a prefix in their segment | `packing.py` |
| `Position.beyond` | older than the staleness bound; `mask` makes them context | `positions.py` |
| `beyond_S` | the same with `cap` and `ratio`, where they stay | here |
| `is_extreme_S` | of these, those with a ratio outside [1/2, 2]; `ratio` leaves them out by `only` | here |
| `kept_S` | not dropped by a mask of the objective: the others have no loss | `masks.py` |
| `counted_S` | in the normalizer | `masks.py`, objective |

Shape suffixes: S sampled tokens of a micro-batch, N its sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.batching.packing import DivisorCounts, PackedBatch

_RENAMED = {
    "pi_S": "logp_S",
    "mu_S": "behavior_logp_S",
    "prox_S": "prox_logp_S",
    "ref_S": "ref_logp_S",
}
"""Earlier attribute names and the present ones, for the error message that an older custom objective gets."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTokens:
    """Sampled tokens of whole sequences, in packed order.

    All float tensors share one dtype, float32 or wider.
    """

    logp_S: Tensor
    """Log-prob under the current weights; the only tensor that carries gradient."""
    behavior_logp_S: Tensor
    """Log-prob under the behavior policy, recorded by the engine at sampling time."""
    advantage_S: Tensor
    """Advantage of each token."""
    segment_S: Tensor
    """int64 in 0..N-1: the sequence of each token."""
    length_N: Tensor
    """Number of sampled tokens of each sequence, as floats."""
    reward_N: Tensor
    """Reward of each sequence, after reward shaping."""
    group_N: Tensor
    """int64: position in the step of each sequence's group."""
    truncated_N: Tensor
    """bool: the sequence ended at the length limit."""
    version_S: Tensor
    """int32: version of the weights that sampled the token."""
    lag_S: Tensor
    """Optimizer steps from the weights that sampled the token to those at the start of the step, as floats.

    0 is on-policy.
    """
    entropy_S: Tensor
    """Entropy of the policy's distribution at the token, in nats; detached without Need.ENTROPY."""
    prox_logp_S: Tensor | None = None
    """Log-prob under the weights at the start of the step, detached; None without Need.PROX."""
    ref_logp_S: Tensor | None = None
    """Log-prob under the frozen reference model; None without Need.REF."""
    collision_S: Tensor | None = None
    """Sum over the vocabulary of the squared probabilities, detached; None without Need.COLLISION."""
    kept_S: Tensor | None = None
    """bool: tokens that no mask drops, for an objective that weighs gradients itself. None: all."""
    counted_S: Tensor | None = None
    """bool: tokens that masks leave in the normalizer. None: all."""
    beyond_S: Tensor | None = None
    """bool: tokens beyond the staleness bound (`staleness.beyond=cap`). None: none."""
    counts: DivisorCounts | None = None
    """For divisors: tokens and samples that the sequences stand for. None: each is a whole sample."""

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        logp_S: Tensor,
        entropy_S: Tensor,
        collision_S: Tensor | None = None,
        *,
        prox_logp_S: Tensor | None = None,
        ref_logp_S: Tensor | None = None,
    ) -> SampledTokens:
        """The sampled tokens of a packed batch, with the results [S] of the forward passes over it."""
        dtype, at = logp_S.dtype, batch.sampled_S
        segment_S = batch.segments_T[at]
        ones_S = torch.ones_like(entropy_S)
        return cls(
            logp_S=logp_S,
            behavior_logp_S=batch.behavior_logp_T[at].to(dtype),
            advantage_S=batch.advantages_T[at].to(dtype),
            segment_S=segment_S,
            length_N=ones_S.new_zeros(batch.num_sequences).index_add(0, segment_S, ones_S),
            reward_N=batch.rewards_N.to(dtype),
            group_N=batch.groups_N,
            truncated_N=batch.truncated_N,
            version_S=batch.versions_T[at],
            lag_S=batch.lags_T[at].to(dtype),
            entropy_S=entropy_S,
            prox_logp_S=prox_logp_S,
            ref_logp_S=ref_logp_S,
            collision_S=collision_S,
            beyond_S=None if batch.beyond_T is None else batch.beyond_T[at],
            counts=batch.counts,
        )

    @property
    def is_extreme_S(self) -> Tensor:
        """bool [S]: tokens beyond the staleness bound whose ratio pi / mu is outside [1/2, 2]."""
        assert self.beyond_S is not None
        return self.beyond_S & (self.log_ratio_S.abs() > math.log(2))

    def only(self, kept_S: Tensor) -> SampledTokens:
        """The same sequences with these sampled tokens only (bool [S]); the others count in divisors only."""
        of_tokens = [each.name for each in fields(self) if each.name.endswith("_S")]
        tensors = {name: value[kept_S] for name in of_tokens if (value := getattr(self, name)) is not None}
        length_N = torch.zeros_like(self.length_N).index_add(
            0, tensors["segment_S"], torch.ones_like(tensors["entropy_S"])
        )
        num_dropped_N = (self.length_N - length_N).long()
        counts = self.counts or DivisorCounts(
            num_masked_N=torch.zeros_like(num_dropped_N),
            sample_length_N=self.length_N.long(),
            num_samples_N=torch.ones_like(num_dropped_N),
            sample_N=torch.arange(len(num_dropped_N), device=num_dropped_N.device),
        )
        counts = counts._replace(num_masked_N=counts.num_masked_N + num_dropped_N)
        return replace(self, **tensors, length_N=length_N, counts=counts)

    def counted_N(self, counted_S: Tensor | None) -> Tensor:
        """[N] number of the sequence's tokens that count in the normalizer, from `counted_S`, bool [S] or
        None (all). Masked tokens beyond the bound count too, or a suffix would gain weight."""
        counted_N = self._num_N(counted_S)
        return counted_N if self.counts is None else counted_N + self.counts.num_masked_N

    def counted_of_sample_N(self, counted_S: Tensor | None) -> Tensor:
        """[N] `counted_N` of the whole sample that the sequence belongs to: the divisor of its mean.

        Tokens of the sample's other sequences, which may be in another micro-batch, all count.
        """
        counted_N = self._num_N(counted_S)
        if self.counts is None:
            return counted_N
        return counted_N + (self.counts.sample_length_N - self.length_N)

    def _num_N(self, counted_S: Tensor | None) -> Tensor:
        return self.length_N if counted_S is None else self.sum_N(counted_S.to(self.length_N.dtype))

    @property
    def sample_N(self) -> Tensor | None:
        """int64: a number for each sample, which its sequences share. None: each sequence is a sample."""
        return None if self.counts is None else self.counts.sample_N

    def of_trained(self, value_N: Tensor) -> Tensor:
        """The values [N] of sequences with tokens: one whose tokens are all masked has no weight."""
        return value_N if self.counts is None else value_N[self.length_N > 0]

    def sum_N(self, value_S: Tensor) -> Tensor:
        """[N] sum of a value [S] over each sequence's sampled tokens."""
        return torch.zeros_like(self.length_N).index_add(0, self.segment_S, value_S)

    def mean_N(self, value_S: Tensor) -> Tensor:
        """[N] mean of a value [S] over each sequence's sampled tokens; 0 for a sequence without any."""
        return self.sum_N(value_S) / self.length_N.clamp(min=1)

    def spread_S(self, value_N: Tensor) -> Tensor:
        """[S] each sequence's value [N], repeated at each of its sampled tokens."""
        return value_N.index_select(0, self.segment_S)

    @cached_property
    def log_ratio_S(self) -> Tensor:
        """[S] log(pi / mu) of each token, detached."""
        return self.logp_S.detach() - self.behavior_logp_S

    @cached_property
    def log_w_N(self) -> Tensor:
        """[N] log W, W = prod_t pi_t / mu_t of the sequence: the sum (not mean) of log-ratios; detached."""
        return self.sum_N(self.log_ratio_S)

    if not TYPE_CHECKING:  # a type checker that saw __getattr__ would accept any misspelled attribute

        def __getattr__(self, name: str) -> None:
            """Raises AttributeError; for an earlier attribute name the message gives the present one."""
            hint = f": renamed to {_RENAMED[name]}" if name in _RENAMED else ""
            raise AttributeError(f"SampledTokens has no attribute {name!r}{hint}", name=name, obj=self)
