"""The methods of preference optimization: from the log-probs of completions to losses and implicit rewards.

A method of pairs has a score for each completion, and a loss of the difference of two scores. The implicit
reward of a completion is what its method compares: beta times its log-ratio, or for methods without a
reference model beta times its mean log-prob. Held-out accuracy and margins are computed from it, as TRL does.

Shape suffix: N completions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_like.config.preferences import PreferenceOptimizationConfig
from trainer.preferences import losses


@dataclass(frozen=True, kw_only=True, eq=False)
class Completions:
    """Log-probs of the completions of a micro-batch, sums over their learned tokens."""

    logp_N: Tensor
    """Under the policy."""
    ref_logp_N: Tensor
    """Under the reference model; unused by a method without one."""
    num_tokens_N: Tensor
    """Number of learned tokens, at least 1."""

    @property
    def log_ratio_N(self) -> Tensor:
        return self.logp_N - self.ref_logp_N

    @property
    def mean_logp_N(self) -> Tensor:
        return self.logp_N / self.num_tokens_N

    @property
    def mean_log_ratio_N(self) -> Tensor:
        return self.log_ratio_N / self.num_tokens_N


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of the methods."""

    has_reference = True
    """True: it compares with the log-probs of a reference model."""
    sft_weight = 0.0
    """Weight of the mean of -log p over the tokens of the best completions, added to the loss."""

    beta: float

    def rewards(self, given: Completions) -> Tensor:
        """[N] implicit rewards."""
        return self.beta * (given.log_ratio_N if self.has_reference else given.mean_logp_N)


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """A method that compares completions of one prompt."""

    @abstractmethod
    def scores(self, given: Completions) -> Tensor:
        """[N] what is compared."""

    @abstractmethod
    def losses(self, margin: Tensor) -> Tensor:
        """Losses, of any shape, of the better completions' scores minus those of the worse ones."""


@dataclass(frozen=True, kw_only=True)
class Dpo(PairMethod):
    """Direct preference optimization; with `label_smoothing` cDPO."""

    label_smoothing: float = 0.0

    def scores(self, given: Completions) -> Tensor:
        return given.log_ratio_N

    def losses(self, margin: Tensor) -> Tensor:
        return losses.dpo(margin, beta=self.beta, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Ipo(PairMethod):
    """Identity preference optimization."""

    def scores(self, given: Completions) -> Tensor:
        return given.mean_log_ratio_N

    def losses(self, margin: Tensor) -> Tensor:
        return losses.ipo(margin, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Simpo(PairMethod):
    """Simple preference optimization: mean log-probs, and a target margin."""

    has_reference = False

    gamma: float
    label_smoothing: float = 0.0

    def scores(self, given: Completions) -> Tensor:
        return given.mean_logp_N

    def losses(self, margin: Tensor) -> Tensor:
        return losses.simpo(margin, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Orpo(PairMethod):
    """Odds ratio preference optimization: supervised training of the best completions, and their odds."""

    has_reference = False
    sft_weight = 1.0

    def scores(self, given: Completions) -> Tensor:
        return losses.log_odds(given.mean_logp_N)

    def losses(self, margin: Tensor) -> Tensor:
        return losses.orpo(margin, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Kto(Method):
    """Kahneman-Tversky optimization: of single completions with labels."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def losses(self, given: Completions, is_desirable_N: Tensor, kl: Tensor) -> Tensor:
        """[N]; `kl`: from `losses.mismatched_kl`."""
        return losses.kto(
            given.log_ratio_N,
            is_desirable_N,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


def build_method(settings: PreferenceOptimizationConfig) -> PairMethod | Kto:
    """The method of a configuration."""
    beta = settings.method_beta
    match settings.method:
        case "dpo":
            return Dpo(beta=beta, label_smoothing=settings.label_smoothing)
        case "ipo":
            return Ipo(beta=beta)
        case "kto":
            return Kto(
                beta=beta,
                desirable_weight=settings.desirable_weight,
                undesirable_weight=settings.undesirable_weight,
            )
        case "simpo":
            return Simpo(beta=beta, gamma=settings.gamma, label_smoothing=settings.label_smoothing)
        case "orpo":
            return Orpo(beta=beta)


def ranked_right(difference: Tensor) -> Tensor:
    """1 where a better completion has the higher reward, 0 where it has the lower one, half where they are
    equal. `difference`: reward of the better minus that of the worse completion."""
    return (difference > 0).double() + (difference == 0).double() / 2


def share_ranked_right(reward_N: Tensor, is_desirable_N: Tensor) -> float:
    """Mean of `ranked_right` over each desirable completion with each undesirable one, the area under the ROC
    curve. NaN without such a pair."""
    good, bad = reward_N[is_desirable_N], reward_N[~is_desirable_N].sort().values
    if not len(good) or not len(bad):
        return float("nan")
    # By ranks: memory grows with the number of completions, not of pairs.
    below, up_to = (torch.searchsorted(bad, good, right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(bad)))
