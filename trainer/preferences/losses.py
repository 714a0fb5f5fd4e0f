"""The losses of preference optimization as functions of the log-probs of completions.

    log-probs of policy and reference -> log-ratios or means -> loss of each pair (or completion)

A log-ratio is log pi(y|x) - log ref(y|x), the sum over the tokens of the completion y. A mean log-prob is
log pi(y|x) divided by the number of these tokens. Every loss is that of one pair or one completion: the
caller takes the mean. All accept any finite input and return finite values and gradients.

Shape suffixes: N completions, M mismatched completions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SUREST = -1e-7
"""Largest mean log-prob whose odds are computed: a probability of 1 has infinite odds."""


def dpo(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """`-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)` of each margin, e the label smoothing.

    `margin`: log-ratio of the chosen minus that of the rejected completion.

    With e = 0 it is DPO (Rafailov et al., arXiv 2305.18290, equation 7), else cDPO, for pairs of which a
    share e is labelled the wrong way round (Mitchell, A note on DPO with noisy preferences, 2023).
    """
    logits = beta * margin
    loss = -F.logsigmoid(logits) * (1 - label_smoothing)
    return loss - F.logsigmoid(-logits) * label_smoothing if label_smoothing else loss


def ipo(mean_margin: Tensor, *, beta: float) -> Tensor:
    """`(m - 1 / (2 beta))^2` of each margin (Azar et al., arXiv 2310.12036, equation 17; beta is its tau).

    `mean_margin`: log-ratio divided by the number of tokens, of the chosen minus that of the rejected
    completion. The paper does not divide; TRL does, and says that the paper's results have it.
    """
    return (mean_margin - 1 / (2 * beta)).square()


def simpo(mean_margin: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """`-log sigmoid(beta m - gamma)` of each margin (Meng et al., arXiv 2405.14734, equation 6).

    `mean_margin`: mean log-prob of the chosen minus that of the rejected completion. `gamma`: target margin
    of the rewards. `label_smoothing`: as in `dpo`; TRL's addition.
    """
    return dpo(mean_margin - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def orpo(log_odds_ratio: Tensor, *, beta: float) -> Tensor:
    """`-beta log sigmoid(r)` of each log odds ratio r, `log_odds` of the chosen minus those of the rejected
    completion (Hong et al., arXiv 2403.07691, equation 7; beta is the lambda of equation 6).

    It is the second term of ORPO. The first one is the supervised loss of the chosen completions.
    """
    return -beta * F.logsigmoid(log_odds_ratio)


def log_odds(mean_N: Tensor) -> Tensor:
    """[N] log(p / (1 - p)), where p is the exponential of a mean log-prob (arXiv 2403.07691, equation 4)."""
    log_p = mean_N.clamp(max=_SUREST)
    # log(1 - p): two forms, each exact in its range. Gradients of the unused one must be finite too.
    is_near_one = log_p > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(is_near_one, log_p, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near_one, -1.0, log_p)))
    return mean_N - torch.where(is_near_one, near, far)


def kto(
    log_ratio_N: Tensor,
    is_desirable_N: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[N] `w+ (1 - sigmoid(beta (r - kl)))` for a desirable completion of log-ratio r, and
    `w- (1 - sigmoid(beta (kl - r)))` for an undesirable one (Ethayarajh et al., arXiv 2402.01306, equation 7;
    the weights w are its lambdas).

    `is_desirable_N`: bool. `kl`: from `mismatched_kl`, without gradient.
    """
    sign_N = torch.where(is_desirable_N, 1.0, -1.0).to(log_ratio_N.dtype)
    weight_N = torch.where(is_desirable_N, desirable_weight, undesirable_weight).to(log_ratio_N.dtype)
    return weight_N * (1 - torch.sigmoid(beta * sign_N * (log_ratio_N - kl)))


def mismatched_kl(log_ratio_M: Tensor) -> Tensor:
    """[] estimate of KL(pi || ref), at least 0 and detached: the mean log-ratio of completions after prompts
    of others of the batch (arXiv 2402.01306, section 4.1; `rotated`)."""
    return log_ratio_M.detach().mean().clamp(min=0)


def rotated(num: int) -> list[int]:
    """For each prompt of a batch, the index of the one with whose completion its KL is estimated: that before
    it, as in TRL's KTOTrainer."""
    return [(index - 1) % num for index in range(num)]
