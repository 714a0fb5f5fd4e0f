"""Generalized advantage estimation (GAE, arXiv 1506.02438) with a critic, as in PPO for language models.

    delta_s  = r_s + gamma_s V_{s+1} - V_s     s: sampled tokens of a sample; V is 0 after the last
    A_s      = delta_s + gamma_s lam A_{s+1}
    target_s = V_s + A_s, with `lam_critic` for lam

gamma_s is `gamma`, times `advantage.turn_discount` where a turn ends. Rewards are per token (`turns.py`):
rewards of tokens, rewards of turns at their last token, the rest of the sample's reward at its last sampled
token, and with `kl.place=reward` minus each token's KL penalty. The turns of a conversation form one sequence
even if it has several segments. The policy's advantages use `lam` and the critic's targets `lam_critic`
(VC-PPO, arXiv 2503.01491): with lam below 1 the reward at the end of a long completion fades before it
reaches the beginning, so the critic regresses on the full return. Advantages are whitened over the step.

A sequence cut off at the length limit ends there like any other, because its reward was computed from the
truncated text. Left out: V-trace and other corrections of the targets for stale samples (the targets are
returns of the policies that sampled; the objective corrects the policy's gradient), length-adaptive lam
(VAPO), and a trunk shared by policy and critic, whose gradient would mix the two losses.

This module is pure numpy; the value model and its training are in `critic.py`.
Shape suffix: S sampled tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.config.common import NonNegativeFloat, NonNegativeInt, PositiveInt
from areal_like.errors import ConfigError
from trainer.advantages.base import ADVANTAGES, Estimator, FloatArray, whitening
from trainer.batching.scope import Scope

_FEW = 24
"""Least number of sequences for which one numpy operation is faster than a Python loop over each."""
_SHORT = 64
"""Shorter sequences, in tokens, are not worth laying out side by side."""


def gae(
    rewards: Sequence[FloatArray],
    values: Sequence[FloatArray],
    *,
    gammas: Sequence[float | FloatArray],
    lam: float,
) -> list[FloatArray]:
    """[S] advantages of the sampled tokens of each sample, in order, from float64 rewards [S] and values [S].

    `gammas`: for each sample the discount from a token to the next, one number or [S].
    """
    deltas, factors = [], []
    for rewards_S, values_S, gamma in zip(rewards, values, gammas, strict=True):
        deltas.append(rewards_S + gamma * np.append(values_S[1:], 0.0) - values_S)
        factors.append(np.broadcast_to(np.asarray(gamma * lam), values_S.shape))
    return backward_sums(deltas, factors)


def backward_sums(deltas: Sequence[FloatArray], factors: Sequence[FloatArray]) -> list[FloatArray]:
    """[S] of each sequence: x_s = delta_s + factor_s x_{s+1}, where x is 0 after the last.

    It goes position by position from the end, over all sequences that are long enough at once. Where fewer
    than _FEW are long enough, it goes sequence by sequence. Both do the same operations on the same numbers,
    so the bits do not depend on the other sequences. Left out: a scan over blocks, whose rounding depends on
    where they begin.
    """
    sums = [np.empty_like(deltas_S) for deltas_S in deltas]
    longest_first = sorted(range(len(deltas)), key=lambda n: -len(deltas[n]))
    num_together = len(deltas[longest_first[_FEW - 1]]) if len(deltas) >= _FEW else 0
    if num_together < _SHORT:
        num_together = 0
    lengths_N = np.array([min(len(deltas[n]), num_together) for n in longest_first], dtype=np.int64)
    # Position k from the end of the sequences that have it is the slice bounds[k]:bounds[k + 1].
    num_at_K = len(deltas) - np.searchsorted(lengths_N[::-1], np.arange(num_together), side="right")
    bounds = [0, *np.cumsum(num_at_K).tolist()]
    place_K = np.array(bounds)
    sums_P, factors_P = np.empty(bounds[-1]), np.empty(bounds[-1])
    for column, n in enumerate(longest_first):
        length = int(lengths_N[column])
        place_k = place_K[:length] + column
        sums_P[place_k] = deltas[n][::-1][:length]
        factors_P[place_k] = factors[n][::-1][:length]
    for before, start, stop in zip(bounds, bounds[1:], bounds[2:], strict=False):
        sums_P[start:stop] += factors_P[start:stop] * sums_P[before : before + stop - start]
    for column, n in enumerate(longest_first):
        length = int(lengths_N[column])
        first = len(deltas[n]) - length
        sums[n][first:] = sums_P[place_K[:length] + column][::-1]
        running = float(sums[n][first]) if length else 0.0
        rest = []
        for delta, factor in zip(
            deltas[n][:first][::-1].tolist(), factors[n][:first][::-1].tolist(), strict=True
        ):
            running = delta + factor * running
            rest.append(running)
        sums[n][:first] = rest[::-1]
    return sums


@ADVANTAGES.register("gae")
@dataclass(frozen=True, kw_only=True)
class Gae(Estimator):
    """Advantage of each token over the critic's estimate.

    Trains a critic, a second model of the policy's size.
    """

    scope = Scope.BATCH
    takes_parts = True

    gamma: float = 1.0
    """Discount per sampled token."""
    lam: float = 0.95
    """Lambda of the policy's advantages: lower relies more on the critic, 1 is return minus value."""
    lam_critic: float = 1.0
    """Lambda of the critic's targets."""
    critic_lr: NonNegativeFloat = 0.0
    """Critic's AdamW learning rate, with the policy's warm-up and schedule; 0: ten times `trainer.lr`."""
    critic_warmup_steps: NonNegativeInt = 0
    """Number of first steps in which only the critic is trained."""
    critic_updates: PositiveInt = 1
    """Updates of the critic per step, all on the step's samples."""
    value_clip: NonNegativeFloat = 0.5
    """Distance a value may move in one step before its loss is clipped; 0: no clip.

    No effect with one update per step.
    """

    def check(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1 or not 0 <= self.lam_critic <= 1:
            raise ConfigError("advantage: gae needs 0 < gamma <= 1, and lam and lam_critic between 0 and 1")

    def of_samples(
        self,
        rewards: Sequence[FloatArray],
        values: Sequence[FloatArray],
        *,
        discounts: Sequence[FloatArray | float],
    ) -> list[tuple[FloatArray, FloatArray]]:
        """(advantages before whitening [S], critic's targets [S]) of the sampled tokens of each sample.

        `discounts`: [S] from each token to the next, in addition to `gamma`.
        """
        gammas = [self.gamma * discounts_S for discounts_S in discounts]
        advantages = gae(rewards, values, gammas=gammas, lam=self.lam)
        errors = advantages
        if self.lam_critic != self.lam:
            errors = gae(rewards, values, gammas=gammas, lam=self.lam_critic)
        return [(a_S, v_S + e_S) for a_S, v_S, e_S in zip(advantages, values, errors, strict=True)]

    def rescale(self, *, advantages_S: FloatArray, groups_S: NDArray[np.int64]) -> tuple[float, float]:
        return whitening(advantages_S)
