"""Intervals of a gain over seeds and prompts, by a two-level bootstrap.

A gain is measured on the same held-out prompts with several seeds: a table with a row for each seed and a
column for each prompt. Both are samples, of the trainings and of the questions that could have been, so both
are drawn again, with replacement: the seeds, and within each data set the prompts, the same ones for all
drawn seeds. The factors are crossed and not nested, because a prompt is hard or easy for all seeds (Owen
2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)). The interval has the 2.5 % and 97.5 %
points of the means that are drawn.

With three seeds it tends to be too narrow in the direction of seeds: a sample of n seeds has (n - 1) / n of
the variance. So a report shows the gain of each seed too. With one seed only the prompts vary.

Shapes: S seeds, P prompts, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A mean over seeds and prompts before and after, and its difference with an interval."""

    before: float
    after: float
    low: float
    high: float
    """Bounds of the 95 % interval of `after - before`."""
    num_seeds: int
    num_prompts: int

    @property
    def mean(self) -> float:
        return self.after - self.before


def gain_of(
    before_SP: NDArray[np.float64],
    after_SP: NDArray[np.float64],
    *,
    sizes: Sequence[int],
    num_draws: int = NUM_DRAWS,
    rng_seed: int = 0,
) -> Gain:
    """The gain of paired scores. `sizes`: number of prompts of each data set, in the order of the columns.

    Raises ValueError for tables of different shapes, or sizes that do not add up to the number of prompts.
    """
    num_seeds, num_prompts = before_SP.shape
    if after_SP.shape != before_SP.shape or sum(sizes) != num_prompts or min(sizes) < 1:
        raise ValueError(f"scores of {before_SP.shape} and {after_SP.shape}, data sets of {list(sizes)}")
    rng = np.random.default_rng(rng_seed)
    seed_counts_BS = _counts(rng, num_seeds, num_draws)
    prompt_counts_BP = np.concatenate([_counts(rng, size, num_draws) for size in sizes], axis=1)
    gain_SP = after_SP - before_SP
    drawn_B = np.einsum("bp,bp->b", seed_counts_BS @ gain_SP, prompt_counts_BP) / gain_SP.size
    low, high = np.quantile(drawn_B, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Gain(
        before=float(before_SP.mean()),
        after=float(after_SP.mean()),
        low=float(low),
        high=float(high),
        num_seeds=num_seeds,
        num_prompts=num_prompts,
    )


def _counts(rng: np.random.Generator, size: int, num_draws: int) -> NDArray[np.float64]:
    """[B, size] how often each of `size` items is drawn in `size` draws with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), size=num_draws).astype(np.float64)
