"""Assigns rows to optimizer steps, as a pure function of the rows' lengths and the settings.

Every epoch is a shuffle of the rows (`areal_like/data/permutation.py`), and epochs follow one another without
a break: only the last step may have fewer rows. So k is the only state that a run needs to continue at step
k, and every rank computes its own share of a step.

Shape suffixes: N rows of the data set, K steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.config import OfflineConfig
from areal_like.data.permutation import permuted
from areal_like.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """The rows of every step."""

    seed: int
    usable_N: NDArray[np.int64]
    """Indices of the rows to learn from, ascending."""
    ends_K: NDArray[np.int64]
    """The end of each step in the sequence of all epochs' rows."""
    order: str
    """Digest, 16 hex digits, of everything that determines the rows of the first steps: a run cannot continue
    with another one."""

    @classmethod
    def of(
        cls, settings: OfflineConfig, num_tokens_N: NDArray[np.int64], *, seed: int, rows: str
    ) -> StepPlan:
        """The plan for rows with these numbers of tokens; 0: the row is left out.

        `rows`: fingerprint of the rows. Raises ConfigError if no row is left.
        """
        usable_N = np.flatnonzero(num_tokens_N)
        if not len(usable_N):
            raise ConfigError(f"{settings.key}.train: no row is left to learn from")
        plan = cls(
            seed=seed,
            usable_N=usable_N,
            ends_K=np.zeros(0, dtype=np.int64),
            order=_digest(rows, num_tokens_N, seed, settings.batch_rows, settings.batch_tokens),
        )
        ends_K = plan._ends(settings, num_tokens_N)
        return cls(seed=seed, usable_N=usable_N, ends_K=ends_K, order=plan.order)

    @property
    def num_steps(self) -> int:
        return len(self.ends_K)

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of one step, in order."""
        begin = int(self.ends_K[step - 1]) if step else 0
        return [self._row(at) for at in range(begin, int(self.ends_K[step]))]

    def epoch(self, step: int) -> float:
        """Number of epochs completed after `step` steps, as a fraction."""
        return float(self.ends_K[step - 1]) / len(self.usable_N) if step else 0.0

    def _row(self, at: int) -> int:
        epoch, index = divmod(at, len(self.usable_N))
        return int(self.usable_N[permuted(index, size=len(self.usable_N), seed=self.seed, epoch=epoch)])

    def _ends(self, settings: OfflineConfig, num_tokens_N: NDArray[np.int64]) -> NDArray[np.int64]:
        total = len(self.usable_N) * settings.num_epochs
        if not settings.batch_tokens:
            num_steps = -(-total // settings.batch_rows)
            num_steps = min(num_steps, settings.num_steps or num_steps)
            ends_K = np.arange(1, num_steps + 1, dtype=np.int64) * settings.batch_rows
            return np.minimum(ends_K, total)
        ends: list[int] = []
        begin = num_tokens = 0
        for at in range(total):
            row_tokens = int(num_tokens_N[self._row(at)])
            is_full = at - begin == settings.batch_rows or num_tokens + row_tokens > settings.batch_tokens
            if at > begin and is_full:
                ends.append(at)
                begin, num_tokens = at, 0
                if len(ends) == settings.num_steps:
                    return np.array(ends, dtype=np.int64)
            num_tokens += row_tokens
        return np.array([*ends, total], dtype=np.int64)


def _digest(rows: str, num_tokens_N: NDArray[np.int64], *settings: int) -> str:
    text = f"{rows} {' '.join(map(str, settings))} ".encode()
    return hashlib.sha256(text + num_tokens_N.astype("<i8").tobytes()).hexdigest()[:16]
