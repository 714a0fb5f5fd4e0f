"""Notices that the policy has lost its entropy without getting better.

Low entropy alone is a poor sign: a policy that has learned a task has little left. In the default job it
falls from .9 to .1 nats while the reward rises to .95. So both are compared with the run's beginning, as
means over `WINDOW` steps:

    entropy < FALLEN * entropy_0   and   reward <= reward_0 + (best - reward_0) / 2

where 0 is the first window and `best` the largest mean reward of any window. The reward has then lost half
of what it had gained, or has gained nothing. Neither depends on the scale of the rewards. The rule notices
neither a policy whose entropy was low from the start nor a reward that stops at a low level and keeps its
gain.

The steps are those that trained some token: without one, no entropy was measured. The state follows from the
rows of metrics.jsonl, so a resumed run has it without a place in the checkpoint.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 10
"""Steps of a mean."""
FALLEN = 0.5
"""Share of the first window's entropy below which it has fallen. In runs of the staleness grid that learned
well it fell further; in those that lost their reward it was often not much lower."""


class EntropyWatch:
    """`observe` is called with every row. Pure.

    BEGINNING (fewer than `WINDOW` rows) -> WATCHING -> FALLEN, for the rest of the run
    """

    def __init__(self) -> None:
        self.warning = ""
        """Empty until the entropy has fallen."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(entropy, reward) of the newest steps."""
        self._first: tuple[float, float] | None = None
        self._best = 0.0

    def observe(self, row: Mapping[str, Any]) -> None:
        """Notes a row of metrics.jsonl."""
        entropy, reward = row.get("entropy"), row.get("reward_mean")
        if self.warning or entropy is None or reward is None or not row.get("num_tokens"):
            return
        self._recent.append((entropy, reward))
        if len(self._recent) < WINDOW:
            return
        entropy, reward = (statistics.fmean(values) for values in zip(*self._recent, strict=True))
        if self._first is None:
            self._first, self._best = (entropy, reward), reward
        self._best = max(self._best, reward)
        first_entropy, first_reward = self._first
        if entropy < FALLEN * first_entropy and reward <= (first_reward + self._best) / 2:
            self.warning = (
                f"step {row['step']}: the entropy has fallen from {first_entropy:.3g} to {entropy:.3g} nats, "
                f"and the reward is {reward:.3g} (first {first_reward:.3g}, best {self._best:.3g}; means of "
                f"{WINDOW} steps): the policy loses variety without getting better. Lower trainer.lr or "
                "max_staleness, raise trainer.entropy_coef, or go back to a checkpoint with resume=step:K"
            )
