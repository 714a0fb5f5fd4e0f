"""REINFORCE with a running baseline: A = R - b, b a mean of the rewards of earlier steps.

    b = sum_s decay^(n-s) m_s / sum_s decay^(n-s)      m_s: mean reward of step s, n steps so far

It is for a single sample per prompt (`sampling.group_size=1`), which has no other samples to be compared
with. Moving baseline: Williams 1992, section 4; for language models arXiv 2402.14740, section 2, where b is
the mean over all steps so far (decay 1). b is known before a step's samples, so it adds no bias, and a group
is scored as soon as it arrives.

b is state: two sums, which every rank computes from the step's mean reward and which checkpoints store. So a
resumed, repeated or replayed step has the same b, to the last bit.

Left out: a baseline for each prompt (SPO, arXiv 2509.13232), which needs prompts that recur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from trainer.advantages.base import ADVANTAGES, Advantage
from trainer.advantages.parts import PartContext


@ADVANTAGES.register("running")
@dataclass(frozen=True, kw_only=True)
class Running(Advantage):
    """A = R - b, b a running mean of the rewards of earlier steps."""

    credits_turns = False
    takes_parts = True

    decay: float = 0.95
    """Weight of a step's mean reward relative to that of the next step; 1: all steps count alike."""
    first: float = 0.0
    """b of the first step, before any reward is known."""

    def check(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"advantage.decay={self.decay}: use a value above 0 and at most 1")

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """[G] rewards, from which `shift` takes the baseline."""
        return [trajectory.reward for trajectory in group]

    @property
    def history_decay(self) -> float:  # type: ignore[override]
        return self.decay

    def of_part(self, reward: float, context: PartContext) -> float:
        """R - b, b as of the step at which the sample's group began."""
        return reward - (context.running.mean if context.running.is_known else self.first)

    def initial_state(self) -> tuple[float, ...]:
        """(0, 0): sum of the weighted means, sum of the weights."""
        return 0.0, 0.0

    def next_state(self, state: Sequence[float], *, mean_reward: float) -> tuple[float, ...]:
        total, weight = state
        return self.decay * total + mean_reward, self.decay * weight + 1

    def shift(self, state: Sequence[float]) -> float:
        total, weight = state
        return -(total / weight) if weight else -self.first
