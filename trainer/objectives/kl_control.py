"""The coefficient of the KL penalty, which `kl.budget` adapts.

Proportional control of Ziegler et al. (arXiv 1909.08593, section 2.2), after each step with the measured KL:

    e = clip(KL / budget - 1, -0.2, 0.2)       coef <- coef (1 + gain e)

So a coefficient changes by at most 20 % of `gain` in a step: with the paper's gain of 0.1 it takes 35 steps
to double. KL here is the mean of the penalty's estimator over the sampled tokens of the step, in nats per
token. (The paper's is the sum over a completion of fixed length.)

Left out: dual ascent, coef <- max(0, coef + rate (KL - budget)), whose step size depends on the scale of
rewards; and counting in samples (the horizon of other implementations), because a step has a fixed number.

The coefficient is a number that every rank computes from the same mean and that checkpoints store, so a
resumed or replayed run has the same coefficients, to the last bit.
"""

from __future__ import annotations

import math

from areal_like.config import KlConfig

_MAX_ERROR = 0.2
_RANGE = 1e4
"""The coefficient stays within this factor of `kl.coef`: a budget out of reach leads to no overflow."""


class KlControl:
    """Pure: `coef` during a step, `update` after it."""

    def __init__(self, settings: KlConfig) -> None:
        """`settings`: with a coefficient above 0."""
        self.settings = settings
        self.coef = settings.coef

    @property
    def is_adaptive(self) -> bool:
        return self.settings.budget > 0

    def update(self, kl: float) -> None:
        """Sets the coefficient of the next step. `kl`: the mean of the step just done; one that is not finite
        changes nothing."""
        if not self.is_adaptive or not math.isfinite(kl):
            return
        error = min(max(kl / self.settings.budget - 1, -_MAX_ERROR), _MAX_ERROR)
        initial = self.settings.coef
        self.coef = min(max(self.coef * (1 + self.settings.gain * error), initial / _RANGE), initial * _RANGE)
