"""SPPO (arXiv 2405.00675): regresses the sample's log-ratio on how often it beats the other samples.

    loss    = mean over samples of [ beta sum_t log(pi_t / mu_t) - (P_i - 1/2) ]^2
    P_i     = mean over the group, i included, of P(y_i beats y_j)                   (P(y_i beats y_i) = 1/2)

Algorithm 1 of the paper; beta is its 1 / eta. mu is the policy that sampled, the paper's pi_t.
P(y_i beats y_j) is `sigmoid((R_i - R_j) / temperature)`: what a reward model of Bradley and Terry says. With
temperature 0 it is 1 for the better, 1/2 for equals and 0 for the worse sample, which suits rewards whose
scale has no meaning. The sum of P_i - 1/2 over a group is 0, so a group of equal rewards pulls pi back to mu.

Against OAPL, large differences of rewards count no more than 1/2. The regression is exact for groups of one
version, as REBEL's.

Additions: the temperature; beta has a default, the one of OAPL's beta2.

Shape suffixes: S sampled tokens, N samples, G samples of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from areal_like.config.common import NonNegativeFloat, PositiveInt
from areal_like.trajectory import REWARD_ROUNDING, Trajectory
from trainer.advantages.base import Advantage, FloatArray, rewards_of
from trainer.objectives.base import OBJECTIVES, Objective, SampledTokens, StepStats, TokenLosses
from trainer.objectives.oapl import default_beta2, regression


@dataclass(frozen=True, kw_only=True)
class WinRate(Advantage):
    """P_i - 1/2, P_i the probability that the sample beats a random one of its group."""

    credits_turns = False

    temperature: float = 1.0
    """Difference of rewards that changes the odds by a factor e; 0: the better sample always wins."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [float(a) for a in self.of_rewards(rewards_of(group))]

    def of_rewards(self, rewards_G: FloatArray) -> FloatArray:
        """[G] from rewards [G]; exactly zero if all are equal, up to rounding (`are_equal_rewards`)."""
        margin_GG = rewards_G[:, None] - rewards_G
        size_GG = np.maximum(np.abs(rewards_G)[:, None], np.abs(rewards_G)).clip(min=1.0)
        margin_GG = np.where(np.abs(margin_GG) <= REWARD_ROUNDING * size_GG, 0.0, margin_GG)
        # tanh(x / 2) / 2 is sigmoid(x) - 1/2, and does not overflow.
        wins_GG = np.tanh(margin_GG / (2 * self.temperature)) if self.temperature else np.sign(margin_GG)
        return np.asarray(wins_GG.mean(1) / 2)


@OBJECTIVES.register("sppo")
@dataclass(frozen=True, kw_only=True)
class Sppo(Objective):
    """`[beta sum_t log(pi / mu) - (P - 1/2)]^2`, P the share of its group that a sample beats"""

    normalizer = "seq_mean_token_sum"
    skips_zero_advantage = False
    takes_parts = False  # P compares all samples of a group
    takes_token_advantages = False

    beta: NonNegativeFloat = 0.0
    """Weight of the log-ratio, 1 / eta in the paper; 0: by length, as `beta2` of `oapl`."""
    temperature: NonNegativeFloat = 1.0
    """Difference of rewards that changes the odds of a comparison by a factor e; 0: the better sample always
    wins."""
    max_tokens: PositiveInt = 64
    """Length for the default of beta; the trainer fills in `sampling.max_new_tokens`."""

    @property
    def advantage(self) -> Advantage:  # type: ignore[override]
        return WinRate(temperature=self.temperature)

    def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
        """The squared residual, spread over the sample's tokens; `residual_abs` is the mean |residual|."""
        return regression(batch, self.beta or default_beta2(self.max_tokens))
