"""The loss of supervised training: the mean of -log p over all learned tokens of a step.

A long completion weighs more than a short one, as in TRL's SFTTrainer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.batching.packing import PackedBatch
from trainer.models.policy import Policy
from trainer.offline.step import OfflineLoss


class SupervisedLoss(OfflineLoss):
    """The policy's negative log-likelihood of the learned tokens."""

    names = ("nll", "entropy", "learned")
    divisor = "learned"

    def __init__(self, policy: Policy) -> None:
        """`policy`: sharded, with temperature 1."""
        assert policy.temperature == 1.0
        super().__init__(policy)

    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        logp_S, entropy_S, *_ = self.model(batch)
        nll = -logp_S.double().sum().detach()
        num_learned = nll.new_full((), len(logp_S))
        return -logp_S.sum(), torch.stack([nll, entropy_S.double().sum(), num_learned])

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """loss and entropy (means over learned tokens, in nats), tokens_trained (learned)."""
        num_learned = max(sums["learned"], 1.0)
        return {
            "loss": sums["nll"] / num_learned,
            "entropy": sums["entropy"] / num_learned,
            "tokens_trained": round(sums["learned"]),
        }
