"""What an objective is: per-token losses from flat sampled tokens and segment ids, and nothing else.

Masks, packing, micro-batches, ranks, normalisers, clipping and the optimizer are not its business. It sees sampled tokens only,
so what is masked cannot contribute; it returns losses that are neither averaged nor weighted, so how the step was cut cannot matter.
What depends on the whole step is declared (`scope = Scope.BATCH`) and comes in three moves, all optional:

    observe(batch) -> vectors, one call a micro-batch    gathered over micro-batches and ranks
    summarize(vectors) -> stats                          once, the same on every rank
    losses(batch, stats)                                 stats are empty under scope GROUP

Under scope GROUP the observing happens beside the gradient, and the stats serve `lr_scale` alone.

An objective of one's own, complete (`objective._target_=my_module.SoftReinforce objective.power=0.5`):

    @dataclass(frozen=True, kw_only=True)
    class SoftReinforce(Objective):
        power: float = 1.0

        def losses(self, batch, stats):
            weight_S = torch.exp(self.power * (batch.logp_S - batch.behavior_logp_S).clamp(max=1.0)).detach()
            return TokenLosses(loss_S=-weight_S * batch.advantage_S * batch.logp_S)

Shape suffixes: S sampled tokens of a micro-batch, N its sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from areal_like.registry import Registry
from trainer.advantages.base import Advantage
from trainer.batching.scope import Scope
from trainer.gradients.base import Gradients

if TYPE_CHECKING:
    from trainer.distributed.ranks import Ranks
    from trainer.models.policy import Policy


class Need(StrEnum):
    """What an objective wants beside pi, mu and the advantage."""

    PROX = "prox"
    """Log-probs under the weights at the start of the step. With one optimizer step a batch that is pi itself, detached: free."""
    REF = "ref"
    """Log-probs under a frozen reference model: one more forward."""
    COLLISION = "collision"
    """Sum over the vocabulary of the squared probabilities at each sampled token: one more pass over the logits."""
    ENTROPY = "entropy"
    """An entropy that carries gradient: its softmax is kept for the backward."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTokens:
    """Sampled tokens of one micro-batch, whole sequences, in packed order. Float tensors share one dtype, float32 or wider."""

    logp_S: Tensor
    """Log-prob under the current weights; the only one that carries gradient."""
    behavior_logp_S: Tensor
    """Behaviour log-prob recorded by the engine."""
    advantage_S: Tensor
    segment_S: Tensor
    """int64 in 0..N-1: the sequence of each token."""
    length_N: Tensor
    """Sampled tokens of each sequence, as floats."""
    reward_N: Tensor
    group_N: Tensor
    """int64: position in the step of each sequence's group."""
    truncated_N: Tensor
    """bool: the sequence ended at the length limit."""
    version_S: Tensor
    """int32: version of the weights that sampled the token."""
    lag_S: Tensor
    """Optimizer steps between the weights that sampled the token and those at the start of the step, as floats; 0 is on-policy."""
    entropy_S: Tensor
    """Entropy of the policy's distribution at the token, in nats; detached unless Need.ENTROPY."""
    prox_logp_S: Tensor | None = None
    """For Need.PROX."""
    ref_logp_S: Tensor | None = None
    """For Need.REF."""
    collision_S: Tensor | None = None
    """For Need.COLLISION; detached."""
    kept_S: Tensor | None = None
    """bool: tokens whose loss masks will leave standing, for an objective that weighs its own gradient. None: all."""
    counted_S: Tensor | None = None
    """bool: tokens that masks leave in the normaliser. None: all."""

    def sum_N(self, value_S: Tensor) -> Tensor:
        """Sum over each sequence's sampled tokens."""
        return torch.zeros_like(self.length_N).index_add(0, self.segment_S, value_S)

    def mean_N(self, value_S: Tensor) -> Tensor:
        """Mean over each sequence's sampled tokens (0 where there are none)."""
        return self.sum_N(value_S) / self.length_N.clamp(min=1)

    def spread_S(self, value_N: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens."""
        return value_N.index_select(0, self.segment_S)

    @cached_property
    def log_ratio_S(self) -> Tensor:
        """log pi/mu, detached."""
        return self.logp_S.detach() - self.behavior_logp_S

    @cached_property
    def log_w_N(self) -> Tensor:
        """log W: the sequence's true log-ratio, a sum and not a mean; detached."""
        return self.sum_N(self.log_ratio_S)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """What an objective returns."""

    loss_S: Tensor
    """Loss of each sampled token; carries the gradient, and each to its own token's log-prob alone, so that masks compose."""
    counted_S: Tensor | None = None
    """bool: tokens that count in the normaliser. None: all of them, also those whose loss was masked to zero."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Vectors, of tokens or sequences, whose mean over the step becomes a metric of that name."""


StepStats = Mapping[str, Tensor]


class Objective(ABC):
    """Base of all. Class attributes may be shadowed by properties where they depend on settings."""

    scope: Scope = Scope.GROUP
    needs: frozenset[Need] = frozenset()
    whole_groups: bool = False
    """True: a group is never split over micro-batches (baselines and gradients of a whole group)."""
    one_sequence_per_microbatch: bool = False
    """True: every sequence is a micro-batch by itself (autograd's own gradient of each sequence)."""
    late_coefficients: bool = False
    """True: `gradients` multiplies the losses by coefficients that it finds later, so nothing else may be added to them."""
    skips_zero_advantage: bool = True
    """True: a group whose advantages are all zero adds nothing to the gradient, so it counts in the normaliser and is not run."""
    single_version: bool = False
    """True: all samples of a group must come from one version of the weights (`buffer.group_filter=single_version`)."""
    advantage: Advantage | None = None
    """Set where the method prescribes its own advantage; it replaces the configured one."""
    normalizer: str | None = None
    """Set where the method prescribes its own normaliser; it replaces the configured one."""

    @abstractmethod
    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """Per-token losses of one micro-batch. Must be finite for any finite log-ratio."""

    def observe(self, batch: SampledTokens) -> dict[str, Tensor]:
        """Vectors of any length that `summarize` needs of this micro-batch; called without gradient."""
        return {}

    def summarize(self, observed: StepStats) -> dict[str, Tensor]:
        """StepStats about the whole step, from each vector's concatenation (float64, on the CPU)."""
        return {}

    def lr_scale(self, stats: StepStats) -> float:
        """Factor on this step's learning rate."""
        return 1.0

    def gradients(self, policy: Policy, ranks: Ranks) -> Gradients:
        """How the micro-batches of a step become its gradient; called once, with the sharded policy.

        Overridden by methods that need more than a sum, such as a baseline from the norms of each sequence's gradient.
        """
        return Gradients()


OBJECTIVES = Registry[Objective]("objective", Objective)  # type: ignore[type-abstract]
