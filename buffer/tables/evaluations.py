"""Held-out evaluations: rounds of one-sample greedy tickets that share the servers with training and are leased first."""

from __future__ import annotations

from collections import deque

from areal_like.wire.messages.consumer import EvalResult
from buffer.tickets import Sample


class EvalRound:
    """One evaluation. OPEN -> (every ticket evaluated or failed) -> DONE, kept so that asking again gets the same answer."""

    def __init__(self, *, eval_id: int, num_prompts: int, min_version: int) -> None:
        self.eval_id = eval_id
        self.num_prompts = num_prompts
        self.min_version = min_version
        self.queue: deque[int] = deque()
        """Ticket ids that no server holds."""
        self.num_failed = 0
        self._num_evaluated = 0
        self._sum_reward = 0.0
        self._sum_tokens = 0
        self._versions: tuple[int, int] | None = None

    def add(self, sample: Sample) -> None:
        """One prompt was evaluated."""
        self._num_evaluated += 1
        self._sum_reward += sample.reward
        self._sum_tokens += sample.num_sampled
        oldest, newest = self._versions or (sample.oldest_version, sample.newest_version)
        self._versions = (min(oldest, sample.oldest_version), max(newest, sample.newest_version))

    @property
    def is_done(self) -> bool:
        """Every prompt was evaluated or has failed."""
        return self._num_evaluated + self.num_failed == self.num_prompts

    def result(self) -> EvalResult:
        """Means over the evaluated prompts (0 if all failed)."""
        count = max(1, self._num_evaluated)
        oldest, newest = self._versions or (self.min_version, self.min_version)
        return EvalResult(
            eval_id=self.eval_id,
            num_evaluated=self._num_evaluated,
            num_failed=self.num_failed,
            mean_reward=self._sum_reward / count,
            mean_tokens=self._sum_tokens / count,
            oldest_version=oldest,
            newest_version=newest,
        )
