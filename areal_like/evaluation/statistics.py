"""Statistics of one evaluation: avg@k with a confidence interval, unbiased pass@k, truncation, length. Pure.

avg@k is the mean over prompts of the mean over their k completions (Mean@k, avg@k). A set of prompts is a
sample of the questions that could be asked, and completions of one prompt are correlated, so the interval is
over prompts: the prompt is the cluster (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section
2.2).

* Rewards that are not all 0 or 1, or several completions of a prompt: Student's t on the means of the
  prompts.
* Rewards of 0 and 1 and one completion of each prompt: Wilson's score interval (Wilson 1927), which is never
  empty at 0 % or 100 % and never leaves 0 to 1.
* Rewards of 0 and 1 and several completions, where all prompts have the same mean, so that t has no width:
  Wilson's interval with the number of prompts, which is wider than the true one.

pass@k is the probability that at least one of k completions is solved, estimated without bias from n >= k
completions of which c are solved, and averaged over prompts: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021,
"Evaluating Large Language Models Trained on Code", arXiv:2107.03374, section 2.1, equation 1).

A failed sample counts with reward 0 and as not solved. Left out: an interval of pass@k.

Shapes: P prompts, S samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MAX_EXACT_DOF = 200
"""Degrees of freedom above which an expansion gives the quantile of Student's t to 9 digits."""


@dataclass(frozen=True, kw_only=True)
class EvalStatistics:
    """The statistics of one evaluation of one set."""

    avg: float
    """avg@S: mean reward over prompts."""
    interval: tuple[float, float] | None
    """95 % confidence interval of `avg`; None for a single prompt whose rewards are not 0 or 1."""
    pass_at_k: dict[int, float]
    """k -> pass@k."""
    truncated_fraction: float
    """Share of truncated samples among those that exist."""
    mean_tokens: float
    """Sampled tokens, over the samples that exist."""
    num_tokens: int
    num_failed: int
    """Failed samples, which count with reward 0, including those recorded with reward 0."""

    @classmethod
    def of(
        cls,
        rewards_PS: NDArray[np.float64],
        *,
        tokens_PS: NDArray[np.integer[Any]],
        is_missing_PS: NDArray[np.bool_],
        has_failed_PS: NDArray[np.bool_],
        is_truncated_PS: NDArray[np.bool_],
        ks: Iterable[int],
        solved_reward: float,
    ) -> EvalStatistics:
        """`is_missing_PS`: there is no sample; `has_failed_PS`: there is one, with reward 0, because it
        failed. `ks`: each at most S. `solved_reward`: minimum reward of a solved completion."""
        has_reward_PS = ~(is_missing_PS | has_failed_PS)
        num_existing = max(1, int(np.count_nonzero(~is_missing_PS)))
        num_solved_P = np.count_nonzero((rewards_PS >= solved_reward) & has_reward_PS, axis=1)
        num_samples = rewards_PS.shape[1]
        num_tokens = int(tokens_PS.sum(dtype=np.int64))
        return cls(
            avg=math.fsum(rewards_PS.ravel().tolist()) / rewards_PS.size,
            interval=confidence_interval(rewards_PS),
            pass_at_k={
                k: math.fsum(pass_at_k(num_samples, int(c), k) for c in num_solved_P) / len(num_solved_P)
                for k in ks
            },
            truncated_fraction=int(np.count_nonzero(is_truncated_PS)) / num_existing,
            mean_tokens=num_tokens / num_existing,
            num_tokens=num_tokens,
            num_failed=int(np.count_nonzero(~has_reward_PS)),
        )


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k completions is solved.

    Computed as a product, because the binomials of equation 1 are too large for floats. Raises ValueError
    unless 0 <= num_solved <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_solved <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} of {num_solved} solved among {num_samples}")
    if num_samples - num_solved < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_solved + 1, num_samples + 1))


def confidence_interval(rewards_PS: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean, clustered by prompt (see the module); None if there is none."""
    num_prompts, num_samples = rewards_PS.shape
    mean_P = rewards_PS.mean(axis=1)
    is_binary = bool(np.isin(rewards_PS, (0.0, 1.0)).all())
    if is_binary and (num_samples == 1 or np.ptp(mean_P) == 0):
        return wilson_interval(float(mean_P.mean()), num_prompts)
    if num_prompts < 2:
        return None
    mean = float(mean_P.mean())
    half = student_t(num_prompts - 1) * float(mean_P.std(ddof=1)) / math.sqrt(num_prompts)
    low, high = mean - half, mean + half
    return (max(0.0, low), min(1.0, high)) if is_binary else (low, high)


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `num_trials` (Wilson 1927)."""
    z_square = _Z * _Z / num_trials
    center = (share + z_square / 2) / (1 + z_square)
    half = _Z / (1 + z_square) * math.sqrt(share * (1 - share) / num_trials + z_square / (4 * num_trials))
    # At 0 and 1 one bound is exact, and rounding must not move it.
    return (center - half if share > 0 else 0.0), (center + half if share < 1 else 1.0)


def student_t(dof: int) -> float:
    """The number t with P(|T| < t) = 95 % for Student's T with `dof` degrees of freedom.

    Computed by bisection of the exact distribution (Abramowitz and Stegun 26.7.3, 26.7.4) up to 200 degrees
    of freedom, and above that by the expansion 26.7.5.
    """
    if dof > _MAX_EXACT_DOF:
        z = _Z
        return (
            z
            + (z**3 + z) / (4 * dof)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
            + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * dof**4)
        )
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, dof) < CONFIDENCE else (low, theta)
    return math.tan(low) * math.sqrt(dof)


def _within(theta: float, dof: int) -> float:
    """P(|T| < tan(theta) * sqrt(dof)), for a whole number of degrees of freedom."""
    sine, cosine = math.sin(theta), math.cos(theta)
    is_odd = dof % 2
    term = cosine if is_odd else 1.0
    total = term if dof > 1 else 0.0
    for i in range(2 + is_odd, dof - 1, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sine * total) if is_odd else sine * total
