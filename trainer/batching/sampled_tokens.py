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

A row N is a sample, even if it is several sequences for the model (`segments.py`).

Shape suffixes: S sampled tokens of a micro-batch, N its samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.batching.packing import PackedBatch

_RENAMED = {
    "pi_S": "logp_S",
    "mu_S": "behavior_logp_S",
    "prox_S": "prox_logp_S",
    "ref_S": "ref_logp_S",
    "segment_S": "sample_S",
}
"""Earlier attribute names and the present ones, for the error message that an older custom objective gets."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTokens:
    """Sampled tokens of whole samples, in packed order.

    All float tensors share one dtype, float32 or wider.
    """

    logp_S: Tensor
    """Log-prob under the current weights; the only tensor that carries gradient, apart from `entropy_S` and
    `reverse_kl_S` for an objective that needs them."""
    behavior_logp_S: Tensor
    """Log-prob under the behavior policy, recorded by the engine at sampling time."""
    advantage_S: Tensor
    """Advantage of each token."""
    sample_S: Tensor
    """int64 in 0..N-1: the sample of each token. All segments of a sample have the same number."""
    length_N: Tensor
    """Number of sampled tokens of each sample, as floats."""
    reward_N: Tensor
    """Reward of each sample, after reward shaping."""
    group_N: Tensor
    """int64: position in the step of each sample's group."""
    truncated_N: Tensor
    """bool: the sample ended at the length limit."""
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
    teacher_logp_S: Tensor | None = None
    """Log-prob under the sample's teacher, NaN for a sample that has none; None without Need.TEACHER."""
    reverse_kl_S: Tensor | None = None
    """KL(pi || teacher) over the vocabulary at the token, with gradient; undefined for a sample without a
    teacher. None without Need.REVERSE_KL."""
    collision_S: Tensor | None = None
    """Sum over the vocabulary of the squared probabilities, detached; None without Need.COLLISION."""
    kept_S: Tensor | None = None
    """bool: tokens that no mask drops, for an objective that weighs gradients itself. None: all."""
    counted_S: Tensor | None = None
    """bool: tokens that masks leave in the normalizer. None: all."""
    beyond_S: Tensor | None = None
    """bool: tokens beyond the staleness bound (`staleness.beyond=cap`). None: none."""
    num_masked_N: Tensor | None = None
    """int64: tokens of each sample that are left out here and count in divisors. None: none."""

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        logp_S: Tensor,
        entropy_S: Tensor,
        collision_S: Tensor | None = None,
        reverse_kl_S: Tensor | None = None,
        *,
        prox_logp_S: Tensor | None = None,
        ref_logp_S: Tensor | None = None,
        teacher_logp_S: Tensor | None = None,
    ) -> SampledTokens:
        """The sampled tokens of a packed batch, with the results [S] of the forward passes over it."""
        dtype, at = logp_S.dtype, batch.sampled_S
        return cls(
            logp_S=logp_S,
            behavior_logp_S=batch.behavior_logp_T[at].to(dtype),
            advantage_S=batch.advantages_T[at].to(dtype),
            sample_S=batch.samples_T[at],
            length_N=batch.sum_N(torch.ones_like(entropy_S)),
            reward_N=batch.rewards_N.to(dtype),
            group_N=batch.groups_N,
            truncated_N=batch.truncated_N,
            version_S=batch.versions_T[at],
            lag_S=batch.lags_T[at].to(dtype),
            entropy_S=entropy_S,
            prox_logp_S=prox_logp_S,
            ref_logp_S=ref_logp_S,
            teacher_logp_S=None if teacher_logp_S is None else teacher_logp_S.to(dtype),
            collision_S=collision_S,
            reverse_kl_S=reverse_kl_S,
            beyond_S=None if batch.beyond_T is None else batch.beyond_T[at],
            num_masked_N=batch.num_masked_N,
        )

    @classmethod
    def of_parts(cls, parts: Sequence[SampledTokens]) -> SampledTokens:
        """The tokens of one sample, from micro-batches that each have a part of it; without gradient."""
        first = parts[0]
        assert all(len(part.length_N) == 1 for part in parts)
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts]).detach() for name in first._of_tokens
        }
        return replace(first, **tensors, length_N=torch.stack([part.length_N for part in parts]).sum(0))

    @property
    def _of_tokens(self) -> list[str]:
        """Names of the tensors [S] that are not None."""
        names = [each.name for each in fields(self) if each.name.endswith("_S")]
        return [name for name in names if getattr(self, name) is not None]

    @property
    def is_extreme_S(self) -> Tensor:
        """bool [S]: tokens beyond the staleness bound whose ratio pi / mu is outside [1/2, 2]."""
        assert self.beyond_S is not None
        return self.beyond_S & (self.log_ratio_S.abs() > math.log(2))

    def only(self, kept_S: Tensor) -> SampledTokens:
        """The same samples with these sampled tokens only (bool [S]); the others count in divisors only."""
        kept = kept_S.nonzero()[:, 0]  # the host waits for a GPU here, and not for each tensor
        tensors = {name: getattr(self, name).index_select(0, kept) for name in self._of_tokens}
        length_N = torch.zeros_like(self.length_N).index_add(
            0, tensors["sample_S"], torch.ones_like(tensors["entropy_S"])
        )
        num_masked_N = (self.length_N - length_N).long()
        if self.num_masked_N is not None:
            num_masked_N = self.num_masked_N + num_masked_N
        return replace(self, **tensors, length_N=length_N, num_masked_N=num_masked_N)

    def counted_N(self, counted_S: Tensor | None) -> Tensor:
        """[N] number of the sample's tokens that count in the normalizer, from `counted_S`, bool [S] or
        None (all). Masked tokens beyond the bound count too, or a suffix would gain weight."""
        counted_N = self.length_N if counted_S is None else self.sum_N(counted_S.to(self.length_N.dtype))
        return counted_N if self.num_masked_N is None else counted_N + self.num_masked_N

    def of_trained(self, value_N: Tensor) -> Tensor:
        """The values [N] of samples with tokens: one whose tokens are all masked has no weight."""
        return value_N if self.num_masked_N is None else value_N[self.length_N > 0]

    def sum_N(self, value_S: Tensor) -> Tensor:
        """[N] sum of a value [S] over each sample's sampled tokens."""
        return torch.zeros_like(self.length_N).index_add(0, self.sample_S, value_S)

    def mean_N(self, value_S: Tensor) -> Tensor:
        """[N] mean of a value [S] over each sample's sampled tokens; 0 for a sample without any."""
        return self.sum_N(value_S) / self.length_N.clamp(min=1)

    def spread_S(self, value_N: Tensor) -> Tensor:
        """[S] each sample's value [N], repeated at each of its sampled tokens."""
        return value_N.index_select(0, self.sample_S)

    @cached_property
    def log_ratio_S(self) -> Tensor:
        """[S] log(pi / mu) of each token, detached."""
        return self.logp_S.detach() - self.behavior_logp_S

    @cached_property
    def log_w_N(self) -> Tensor:
        """[N] log W, W = prod_t pi_t / mu_t of the sample: the sum (not mean) of log-ratios; detached."""
        return self.sum_N(self.log_ratio_S)

    if not TYPE_CHECKING:  # a type checker that saw __getattr__ would accept any misspelled attribute

        def __getattr__(self, name: str) -> None:
            """Raises AttributeError; for an earlier attribute name the message gives the present one."""
            hint = f": renamed to {_RENAMED[name]}" if name in _RENAMED else ""
            raise AttributeError(f"SampledTokens has no attribute {name!r}{hint}", name=name, obj=self)
