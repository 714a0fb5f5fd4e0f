"""Detects that an engine has free slots because the server's samples wait for rewards or tools.

A server may hold `rollout.max_episodes` samples. If so many of them wait for their reward or environment that
no further group fits, the engine gets no new work: rewards or tools are slower than the engine. The duration
of this state is a metric, and after a while a log line says, once, what to change.

Pure: no clock. Not counted: an engine without work because the buffer grants none (the staleness bound).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from areal_like.config import Config
from rollout_server.leases.held_leases import Place

_HINT_AFTER_S = 15.0
"""Time before the hint is logged: longer than a burst of samples that end together."""


class Starvation:
    """Measures the starvation of one server's engine. `now_s`: seconds on any monotonic clock."""

    def __init__(self, *, max_running: int, max_episodes: int, group_samples: int) -> None:
        """`group_samples`: number of samples leased together; they are granted only if the server may hold
        all of them."""
        self._max_running = max_running
        self._max_episodes = max_episodes
        self._group_samples = group_samples
        self._observed_s = 0.0
        self._has_hinted = False
        self.is_starved = False
        self.seconds_total = 0.0
        """Time in which the engine was starved, in seconds."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Creates it with the limits of a job."""
        return cls(
            max_running=config.rollout.max_running,
            max_episodes=config.rollout.most_episodes,
            group_samples=config.sampling.group_size + config.sampling.greedy_baseline,
        )

    def observe(self, num_at: Mapping[Place, int], *, now_s: float) -> str:
        """Takes the number of held samples by place; returns a hint for the log once, otherwise an empty
        string.

        The time since the last call counts according to the state at that call.
        """
        if self.is_starved:
            self.seconds_total += now_s - self._observed_s
        self._observed_s = now_s
        num_held = sum(num_at.values())
        at_engine, in_tools, in_rewards = (num_at.get(place, 0) for place in Place)
        self.is_starved = (
            at_engine < self._max_running and self._max_episodes - num_held < self._group_samples
        )
        if not self.is_starved or self._has_hinted or self.seconds_total < _HINT_AFTER_S:
            return ""
        self._has_hinted = True
        change = (
            "raise rollout.reward_workers (for an asynchronous reward, rollout.reward_concurrency), or with "
            "distill.teachers at servers distill.max_requests or their number"
            if in_rewards >= in_tools
            else "raise rollout.max_episodes, make environments or agents faster, or start more agents"
        )
        return (
            f"the engine has work for {at_engine} of {self._max_running} sequences: {in_rewards} samples "
            f"wait for their reward and {in_tools} for their environment or agent, and the server holds no "
            f"more than {self._max_episodes} (rollout.max_episodes); {change}"
        )
