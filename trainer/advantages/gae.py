"""Generalized advantage estimation (GAE, arXiv 1506.02438) with a critic, as in PPO for language models.

    delta_s  = r_s + gamma_s V_{s+1} - V_s     s: sampled tokens of a sample; V is 0 after the last
    A_s      = delta_s + gamma_s lam A_{s+1}
    target_s = V_s + A_s, with `lam_critic` for lam

gamma_s is `gamma`, times `advantage.turn_discount` where a turn ends. Rewards are per token (`turns.py`): of
tokens, of turns at their last token, the rest of the sample's reward at its last sampled token, and with
`kl.place=reward` minus each token's KL penalty. The turns of a conversation follow one another also where it
has several segments. The policy's advantages use `lam` and the critic's targets `lam_critic` (VC-PPO, arXiv
2503.01491): with lam below 1 the reward at the end of a long answer fades before it reaches the beginning, so
the critic regresses on the full return. Advantages are whitened over the step.

A sequence cut off at the length limit ends there like any other, because its reward was given for the text
that exists. Left out: V-trace and other corrections of the targets for stale samples (the targets are returns
of the policies that sampled; the objective corrects the policy's gradient), length-adaptive lam (VAPO), and a
trunk shared by policy and critic, whose gradient would mix the two losses.

This module is pure numpy; the value model and its training are in `critic.py`.
Shape suffix: S sampled tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError
from trainer.advantages.base import ADVANTAGES, Estimator, FloatArray, whitening
from trainer.batching.scope import Scope


def gae(rewards_S: FloatArray, values_S: FloatArray, *, gamma: float | FloatArray, lam: float) -> FloatArray:
    """[S] advantages of one sample's sampled tokens, in order, from float64 rewards [S] and values [S].

    `gamma`: the discount from a token to the next, one number or [S].
    """
    deltas_S = rewards_S + gamma * np.append(values_S[1:], 0.0) - values_S
    factors_S = np.broadcast_to(np.asarray(gamma * lam), deltas_S.shape)
    advantages_S, running = np.empty_like(deltas_S), 0.0
    for s in reversed(range(len(deltas_S))):
        running = deltas_S[s] + factors_S[s] * running
        advantages_S[s] = running
    return advantages_S


@ADVANTAGES.register("gae")
@dataclass(frozen=True, kw_only=True)
class Gae(Estimator):
    """Advantage of each token over the critic's estimate.

    Trains a critic, a second model of the policy's size.
    """

    scope = Scope.BATCH

    gamma: float = 1.0
    """Discount per sampled token."""
    lam: float = 0.95
    """Lambda of the policy's advantages: lower relies more on the critic, 1 is return minus value."""
    lam_critic: float = 1.0
    """Lambda of the critic's targets."""
    critic_lr: float = 0.0
    """Critic's AdamW learning rate, with the policy's warm-up and schedule; 0: ten times `trainer.lr`."""
    critic_warmup_steps: int = 0
    """Number of first steps in which only the critic is trained."""
    critic_updates: int = 1
    """Updates of the critic per step, all on the step's samples."""
    value_clip: float = 0.5
    """Distance a value may move in one step before its loss is clipped; 0: no clip.

    No effect with one update per step.
    """

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1 or not 0 <= self.lam_critic <= 1:
            raise ConfigError("advantage: gae needs 0 < gamma <= 1, and lam and lam_critic between 0 and 1")
        if (
            self.critic_lr < 0
            or self.critic_warmup_steps < 0
            or self.critic_updates < 1
            or self.value_clip < 0
        ):
            raise ConfigError(
                "advantage: gae needs critic_lr, critic_warmup_steps and value_clip of at least 0, "
                "and critic_updates of at least 1"
            )

    def of_tokens(
        self, rewards_S: FloatArray, values_S: FloatArray, *, discounts_S: FloatArray | float = 1.0
    ) -> tuple[FloatArray, FloatArray]:
        """(advantages before whitening [S], critic's targets [S]) of the sampled tokens of one sample.

        `discounts_S`: from each token to the next, in addition to `gamma`.
        """
        gamma = self.gamma * discounts_S
        advantages_S = gae(rewards_S, values_S, gamma=gamma, lam=self.lam)
        if self.lam_critic == self.lam:
            return advantages_S, values_S + advantages_S
        return advantages_S, values_S + gae(rewards_S, values_S, gamma=gamma, lam=self.lam_critic)

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """Whitens the step."""
        return whitening(advantages_S)
