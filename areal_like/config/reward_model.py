"""Settings of the training of reward models (`areal-like reward-model`), in addition to the trainer's."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config.common import NonNegativeFloat
from areal_like.config.offline import PreferencesConfig


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PreferencesConfig, key="reward_model"):
    """Training of a Bradley-Terry reward model on comparisons of completions.

    Optimizer, micro-batches, ranks and checkpoints are those of the section `trainer`.
    """

    center_coef: NonNegativeFloat = 0.0
    """Coefficient of the mean of (sum of both scores)^2 in the loss, which keeps scores around 0; 0: none.
    TRL's `center_rewards_coefficient`, for which 0.01 is usual."""
