"""How much of the time limit of the current reward is left, for rewards that can end in time by themselves.

A reward that exceeds `rollout.reward_timeout_s` counts 0 by default, because answers that hang the verifier
should not be repeated. A reward that waits for a service is late for another reason, and has to fail before:
it asks here how long it may wait. The worker sets the limit for each reward.
"""

from __future__ import annotations

import math
import time
from contextvars import ContextVar

_ends_s: ContextVar[float] = ContextVar("ends_s", default=math.inf)


def begin_reward(timeout_s: float) -> None:
    """A reward of this context begins now; it has `timeout_s` seconds."""
    _ends_s.set(time.monotonic() + timeout_s)


def reward_time_left_s() -> float:
    """Seconds that the reward of this context has left; infinite outside of a worker."""
    return _ends_s.get() - time.monotonic()
