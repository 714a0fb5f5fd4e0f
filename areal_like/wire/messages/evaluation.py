"""Trainer rank 0 <-> buffer: one evaluation of one set, its request and its result (part of `consumer.py`).

The result has numbers for each sample and no statistics: these are computed where they are shown
(`areal_like/evaluation/statistics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from areal_like.config.evaluation import DEFAULT_SET


@dataclass(frozen=True, kw_only=True)
class RequestEval:
    """Rank 0 -> buffer: evaluate held-out prompts 0..num_prompts-1 of a set.

    Reply: `EvalResult` when done (long poll).

    A repeated request with the same eval_id and set waits for the same evaluation, also after a restart of
    the buffer. Sets requested together are served in the order of their requests.
    """

    eval_id: int
    """Identifies the trainer's evaluation: completed optimizer steps."""
    eval_set: str = DEFAULT_SET
    num_prompts: int
    num_samples: int = 1
    """Samples of each prompt."""
    min_version: int
    """Only servers at this version or a newer one take part."""


class SampleOutcome(IntFlag):
    """The outcome of one sample of an evaluation."""

    MISSING = 1
    """There is no sample: each attempt failed."""
    FAILED = 2
    """It failed and was recorded with reward 0 (`buffer.on_failure`)."""
    TRUNCATED = 4
    """A limit, not the policy, ended it."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Buffer -> rank 0: a finished evaluation of one set.

    The arrays have an entry for each sample, those of a prompt next to each other, in order. Raises
    ValueError if they do not fit together.
    """

    eval_id: int
    eval_set: str
    num_samples: int
    """Samples of each prompt."""
    rewards: NDArray[np.float64]
    """A sample that failed has 0."""
    tokens: NDArray[np.int32]
    """Sampled tokens; 0 for a sample that does not exist."""
    outcomes: NDArray[np.uint8]
    """The flags of `SampleOutcome`."""
    oldest_version: int
    """Smallest version among all sampled tokens, as the engines reported it; -1 if there is none."""
    newest_version: int
    oldest_step: int
    """Optimizer step of the oldest of these weights; -1 if there is none."""
    newest_step: int

    def __post_init__(self) -> None:
        sizes = {len(self.rewards), len(self.tokens), len(self.outcomes)}
        if len(sizes) > 1 or self.num_samples < 1 or len(self.rewards) % self.num_samples:
            raise ValueError(f"want {self.num_samples} samples of each prompt in every array, got {sizes}")
        if not np.isfinite(self.rewards).all():
            raise ValueError("a reward is not finite")

    @property
    def num_prompts(self) -> int:
        return len(self.rewards) // self.num_samples

    @property
    def num_failed(self) -> int:
        """Samples that do not exist: they count 0."""
        return self.count(SampleOutcome.MISSING)

    @property
    def num_evaluated(self) -> int:
        """The other samples, those recorded with reward 0 included."""
        return len(self.rewards) - self.num_failed

    def count(self, outcome: SampleOutcome) -> int:
        return int(np.count_nonzero(self.outcomes & int(outcome)))
