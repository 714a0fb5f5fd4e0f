"""The methods of preference optimization: from the log-probs of completions to losses and implicit rewards.

The implicit reward of a completion is what its method compares: beta times its log-ratio, or for methods
without a reference model beta times its mean log-prob. Held-out accuracy and margins are computed from it,
as TRL does.

Shape suffixes: N completions, P pairs; of the 2 P completions of pairs, the even ones are chosen, each
followed by the rejected one of its pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_like.config.preferences import PreferencesConfig
from trainer.preferences import losses


@dataclass(frozen=True, kw_only=True, eq=False)
class Completions:
    """Log-probs of the completions of a micro-batch, sums over their learned tokens."""

    logp_N: Tensor
    """Under the policy."""
    ref_logp_N: Tensor
    """Under the reference model; zero for a method without one."""
    num_tokens_N: Tensor
    """Number of learned tokens, at least 1."""
    is_desirable_N: Tensor
    """bool: the completion is the chosen one of its pair, or has a good label."""

    @property
    def log_ratio_N(self) -> Tensor:
        return self.logp_N - self.ref_logp_N

    @property
    def mean_logp_N(self) -> Tensor:
        return self.logp_N / self.num_tokens_N

    @property
    def mean_log_ratio_N(self) -> Tensor:
        return self.log_ratio_N / self.num_tokens_N


def margins(value_N: Tensor) -> Tensor:
    """[P] value of the chosen completion minus that of the rejected one."""
    return value_N[0::2] - value_N[1::2]


class Method(ABC):
    """Base of the methods. One unit is a pair, or a single completion if not `of_pairs`."""

    of_pairs: bool = True
    """True: a loss has a pair of completions; False: one labelled completion."""
    has_reference: bool = True
    """True: the losses use the log-probs of a reference model."""
    has_kl: bool = False
    """True: the losses use the KL that mismatched completions estimate (`losses.mismatched_kl`)."""
    sft_weight: float = 0.0
    """Weight of the mean of -log p over the tokens of chosen completions, added to the loss."""

    @abstractmethod
    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        """Loss of each unit of a micro-batch, without the supervised term. `kl`: 0 unless `has_kl`."""

    @abstractmethod
    def rewards(self, given: Completions) -> Tensor:
        """[N] implicit rewards."""


@dataclass(frozen=True, kw_only=True)
class Dpo(Method):
    """Direct preference optimization; with `label_smoothing` cDPO."""

    beta: float
    label_smoothing: float = 0.0

    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        margin_P = margins(given.log_ratio_N)
        return losses.dpo(margin_P, beta=self.beta, label_smoothing=self.label_smoothing)

    def rewards(self, given: Completions) -> Tensor:
        return self.beta * given.log_ratio_N


@dataclass(frozen=True, kw_only=True)
class Ipo(Method):
    """Identity preference optimization."""

    beta: float

    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        return losses.ipo(margins(given.mean_log_ratio_N), beta=self.beta)

    def rewards(self, given: Completions) -> Tensor:
        return self.beta * given.log_ratio_N


@dataclass(frozen=True, kw_only=True)
class Kto(Method):
    """Kahneman-Tversky optimization: of completions with labels."""

    of_pairs = False
    has_kl = True

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        return losses.kto(
            given.log_ratio_N,
            given.is_desirable_N,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def rewards(self, given: Completions) -> Tensor:
        return self.beta * given.log_ratio_N


@dataclass(frozen=True, kw_only=True)
class Simpo(Method):
    """Simple preference optimization: mean log-probs, and a target margin."""

    has_reference = False

    beta: float
    gamma: float
    label_smoothing: float = 0.0

    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        return losses.simpo(
            margins(given.mean_logp_N),
            beta=self.beta,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
        )

    def rewards(self, given: Completions) -> Tensor:
        return self.beta * given.mean_logp_N


@dataclass(frozen=True, kw_only=True)
class Orpo(Method):
    """Odds ratio preference optimization: supervised training of chosen completions, and their odds."""

    has_reference = False
    sft_weight = 1.0

    beta: float

    def losses(self, given: Completions, kl: Tensor) -> Tensor:
        mean_N = given.mean_logp_N
        return losses.orpo(mean_N[0::2], mean_N[1::2], beta=self.beta)

    def rewards(self, given: Completions) -> Tensor:
        return self.beta * given.mean_logp_N


def build_method(settings: PreferencesConfig) -> Method:
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


def share_ranked_right(reward_N: Tensor, is_desirable_N: Tensor, *, of_pairs: bool) -> float:
    """Share of pairs of a desirable and an undesirable completion in which the desirable one has the higher
    reward; equal rewards count half. NaN without such a pair.

    `of_pairs`: the pairs are those of the rows; else each desirable completion is compared with each
    undesirable one (the area under the ROC curve).
    """
    if of_pairs:
        margin = margins(reward_N)
    else:
        good, bad = reward_N[is_desirable_N], reward_N[~is_desirable_N]
        # Ranks instead of all pairs: memory stays linear.
        bad = bad.sort().values
        below = torch.searchsorted(bad, good)
        up_to = torch.searchsorted(bad, good, right=True)
        return (
            float((below + up_to).double().mean() / (2 * len(bad)))
            if len(good) and len(bad)
            else float("nan")
        )
    return float(((margin > 0).double() + (margin == 0).double() / 2).mean())
