"""Generalised advantage estimation (arXiv 1506.02438) with a critic, as PPO uses it for language models. Pure: the critic is `critic.py`.

    delta_s = r_s + gamma V_{s+1} - V_s          over the sampled tokens of a sequence, others skipped; V is 0 behind the last
    A_s     = delta_s + gamma lam A_{s+1}
    target  = V_s + A_s, made with `lam_critic`

Rewards are of tokens: the sequence's at its last sampled token, the price of leaving the reference model (`kl.place=reward`) at each. The
policy learns with `lam`, the critic with `lam_critic` (VC-PPO, arXiv 2503.01491: with lam below 1 the reward at the end of a long answer
fades before it reaches the beginning, so the critic is taught by the whole return). Advantages are whitened over the step.

A sequence cut off at the length limit ends there like any other: its reward was given for what there is. Left out: V-trace and other
corrections of the targets for stale samples (they are returns of the policies that sampled; the objective weighs the policy's gradient),
length-adaptive lam (VAPO), and a trunk that policy and critic share (its gradient would be neither's).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError
from trainer.advantages.base import ADVANTAGES, Estimator, FloatArray, whitening
from trainer.batching.scope import Scope


def gae(rewards_S: FloatArray, values_S: FloatArray, *, gamma: float, lam: float) -> FloatArray:
    """A_s of the sampled tokens of one sequence, in order."""
    deltas_S = rewards_S + gamma * np.append(values_S[1:], 0.0) - values_S
    advantages_S, running = np.empty_like(deltas_S), 0.0
    for s in reversed(range(len(deltas_S))):
        running = deltas_S[s] + gamma * lam * running
        advantages_S[s] = running
    return advantages_S


@ADVANTAGES.register("gae")
@dataclass(frozen=True, kw_only=True)
class Gae(Estimator):
    """What a token was worth more than the critic expected before it. Trains a critic: a second model of the policy's size."""

    scope = Scope.BATCH

    gamma: float = 1.0
    """Discount a sampled token."""
    lam: float = 0.95
    """Lambda of the policy's advantages: lower leans on the critic, 1 is return minus value."""
    lam_critic: float = 1.0
    """Lambda of the critic's targets."""
    critic_lr: float = 0.0
    """AdamW learning rate of the critic, with the policy's warm-up and schedule; 0: ten times `trainer.lr`."""
    critic_warmup_steps: int = 0
    """First steps, in which the critic alone learns."""
    critic_updates: int = 1
    """Updates of the critic a step, all on the step's samples."""
    value_clip: float = 0.5
    """How far a value may move in one step before its loss stops pulling; 0: any distance. Says nothing with one update a step."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1 or not 0 <= self.lam_critic <= 1:
            raise ConfigError("advantage: gae wants 0 < gamma <= 1, and lam and lam_critic between 0 and 1")
        if (
            self.critic_lr < 0
            or self.critic_warmup_steps < 0
            or self.critic_updates < 1
            or self.value_clip < 0
        ):
            raise ConfigError(
                "advantage: gae wants critic_lr, critic_warmup_steps and value_clip of at least 0, and critic_updates of at least 1"
            )

    def of_tokens(self, rewards_S: FloatArray, values_S: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(advantages before whitening, targets of the critic) of the sampled tokens of one sequence."""
        advantages_S = gae(rewards_S, values_S, gamma=self.gamma, lam=self.lam)
        if self.lam_critic == self.lam:
            return advantages_S, values_S + advantages_S
        return advantages_S, values_S + gae(rewards_S, values_S, gamma=self.gamma, lam=self.lam_critic)

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        """Whitens the step."""
        return whitening(advantages_S)
