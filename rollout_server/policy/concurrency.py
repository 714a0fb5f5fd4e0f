"""Limits how many samples of a server may be at its engine: additive increase, multiplicative decrease.

An engine that runs out of KV memory retracts sequences: it drops their KV and computes all of it again later.
Too many long samples at a time therefore make it slower, and too few leave it idle; the right number depends
on the lengths, which change while the policy learns. So when sequences are retracted or the KV cache is
nearly full, the limit falls to a fraction of the number of samples at the engine, and it rises slowly while
there is room (the rule of TCP's congestion control: Chiu and Jain, 1989; prime-rl uses it for rollouts).

    at the limit, KV below `_ROOM` -> limit + step, at most once in `_GROW_EVERY_S`
    retractions, or KV above `_FULL` -> limit * `_SHRINK`; again when the samples have fallen to the limit

Pure: no sockets, no tasks, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROOM = 0.9
"""Fraction of the KV cache in use below which more samples fit; there is a margin because running ones still
grow."""
_FULL = 0.99
_SHRINK = 0.9
_STEPS = 64
"""Number of increases from zero to the largest limit."""
_GROW_EVERY_S = 5.0
"""Minimum time between increases. A new sample's KV grows with its completion, so an increase takes effect
slowly."""


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """An engine's report about its samples and its KV cache."""

    num_samples: int
    """Number of sequences that run or wait at the engine."""
    num_running: int
    kv_usage: float
    """Fraction of the KV cache that running sequences use."""
    num_retractions: int
    """Sequences retracted for lack of KV memory since the engine's start."""

    @classmethod
    def of(cls, load: Mapping[str, Any]) -> EngineLoad:
        """Builds it from `EngineClient.load`; values that the engine does not report are 0."""
        running = int(load.get("running", 0))
        return cls(
            num_samples=running + int(load.get("waiting", 0)),
            num_running=running,
            kv_usage=float(load.get("kv_usage", 0.0)),
            num_retractions=int(load.get("retractions", 0)),
        )


class ConcurrencyController:
    """Controls the limit for one engine, which is always between 1 and `most`. `now_s`: seconds on any
    monotonic clock."""

    def __init__(self, *, most: int) -> None:
        """`most`: the initial and largest limit."""
        self.most = most
        self.limit = most
        self._num_retractions = 0
        self._changed_s = float("-inf")

    def observe(self, load: EngineLoad, *, now_s: float) -> int:
        """Takes the newest load of the engine; returns the limit from now on."""
        # A count that has fallen comes from another engine.
        has_retracted = load.num_retractions > self._num_retractions
        self._num_retractions = load.num_retractions
        if has_retracted or load.kv_usage > _FULL:
            # While there are samples above the limit, the last decrease has not taken effect yet.
            if load.num_samples <= self.limit:
                self._decrease(load, now_s=now_s)
        elif (
            self.limit < self.most
            and load.num_samples >= self.limit
            and load.kv_usage < _ROOM
            and now_s - self._changed_s >= _GROW_EVERY_S
        ):
            self.limit = min(self.most, self.limit + max(1, self.most // _STEPS))
            self._changed_s = now_s
        return self.limit

    def _decrease(self, load: EngineLoad, *, now_s: float) -> None:
        held = min(self.limit, load.num_running or self.limit)
        self.limit = max(1, min(int(held * _SHRINK), self.limit))
        self._changed_s = now_s
