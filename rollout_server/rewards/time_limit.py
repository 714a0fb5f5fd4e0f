"""The remaining time of the current reward, for rewards that can stop in time by themselves.

A reward that exceeds `rollout.reward_timeout_s` counts as 0 by default, to discourage completions that hang
the verifier. A reward that waits for a service may be late for another reason and should fail before the
limit: it asks here how long it may wait. The worker sets the limit for each reward.
"""

from __future__ import annotations

import math
import time
from contextvars import ContextVar

_ends_s: ContextVar[float] = ContextVar("ends_s", default=math.inf)


def begin_reward(timeout_s: float) -> None:
    """Starts the time limit of a reward in this context: `timeout_s` seconds."""
    _ends_s.set(time.monotonic() + timeout_s)


def reward_time_left_s() -> float:
    """Returns the seconds left for the reward in this context; infinite outside a worker."""
    return _ends_s.get() - time.monotonic()
