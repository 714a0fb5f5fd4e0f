"""PRIME (arXiv 2502.01456): process rewards from a model that learns from outcomes along with the policy.

    r_t  = beta (log phi(y_t) - log ref(y_t))           reward of each sampled token y_t
    loss = -[o log sigma(sum_t r_t) + (1 - o) log(1 - sigma(sum_t r_t))]       of each sample, for phi

phi is the implicit process reward model: a second model that starts as the policy does, from the initial
model; ref is the initial model. o is the outcome: the task's reward of the sample, clipped to 0..1. Both
terms, of the tokens and of the outcome, have a leave-one-out baseline over the K samples of a group:

    A_it = process sum_{s >= t} gamma^(s-t) [r_is - mean_{j != i} rbar_j] + o_i - mean_{j != i} o_j

rbar_j is the mean of r over the tokens of sample j; in the second term o is the reward after shaping and KL
penalty, not clipped. With `process` 1 this is the paper's advantage with RLOO. The authors' release (verl's
recipe `prime`, `compute_rloo_advantage_return`) adds (r_is - rbar_i) / (K - 1) to the first bracket and
whitens the advantages over the batch. The defaults of `beta` and of the learning rates' ratio are that
recipe's.

The order in a step is the one that the authors describe (Algorithm 1; model card of Eurus-2-7B-PRIME):
rewards under phi, then phi's update from them, then advantages from the same rewards and the policy's update
("single forward"). Since the rewards are computed before, phi is updated with the policy at the end of a
step, and an abandoned step leaves it unchanged. Left out: rewards under the updated phi ("double forward",
the recipe's `update=before`), which costs one more forward of phi and would have to undo an update of an
abandoned step; and the filter of prompts by accuracy (`buffer.group_filter=spread`, `buffer.curriculum`).

This module is pure numpy; the model is in `implicit_rewards.py`.
Shape suffixes: S sampled tokens of a sample, K samples of a group, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from areal_like.config.common import NonNegativeFloat, PositiveFloat
from areal_like.errors import ConfigError
from trainer.advantages.base import ADVANTAGES, Estimator, FloatArray
from trainer.advantages.gae import backward_sums
from trainer.advantages.group import centered
from trainer.batching.scope import Scope


@ADVANTAGES.register("prime")
@dataclass(frozen=True, kw_only=True)
class Prime(Estimator):
    """Leave-one-out advantages of outcomes, and of token rewards from a model that learns from outcomes.

    Trains that model, a second one of the policy's size, and needs the initial model as a reference.
    """

    scope = Scope.BATCH

    beta: PositiveFloat = 0.05
    """Weight of the log-ratio in a token's reward."""
    process: NonNegativeFloat = 1.0
    """Weight of the token rewards in the advantages; 0: RLOO, and the reward model still learns."""
    gamma: float = 1.0
    """Discount per sampled token of the token rewards."""
    prm_lr: NonNegativeFloat = 0.0
    """The reward model's AdamW learning rate, with the policy's warm-up and schedule; 0: twice
    `trainer.lr`."""

    def check(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"advantage.gamma={self.gamma}: use a number above 0 and at most 1")

    def of_group(self, rewards_K: FloatArray, process: Sequence[FloatArray]) -> list[FloatArray]:
        """[S] advantages of the sampled tokens of each sample of a group.

        `rewards_K`: the samples' rewards after shaping. `process`: [S] rewards of their tokens. A group of
        one sample has no baseline; its advantages are zero.
        """
        others = len(rewards_K) - 1
        if not others:
            return [np.zeros_like(process[0])]
        outcome_K = centered(rewards_K) * (len(rewards_K) / others)
        mean_K = np.array([float(r_S.mean()) if len(r_S) else 0.0 for r_S in process])
        baseline_K = (mean_K.sum() - mean_K) / others
        deltas = [r_S - baseline for r_S, baseline in zip(process, baseline_K.tolist(), strict=True)]
        returns = backward_sums(deltas, [np.full_like(delta_S, self.gamma) for delta_S in deltas])
        return [self.process * g_S + a for g_S, a in zip(returns, outcome_K.tolist(), strict=True)]


def cross_entropy(logits_N: FloatArray, outcomes_N: FloatArray) -> tuple[FloatArray, FloatArray]:
    """([N] loss of sigma(logit) against an outcome in 0..1, [N] its derivative by the logit)."""
    losses_N = np.logaddexp(0.0, logits_N) - outcomes_N * logits_N
    return losses_N, 0.5 * (1 + np.tanh(0.5 * logits_N)) - outcomes_N
