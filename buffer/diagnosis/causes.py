"""A daemon, or a part of one, on which a job waits, and from when on waiting is worth a line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class On(StrEnum):
    """What a job waits for."""

    TRAINER = "trainer"
    SERVER = "rollout_server"
    ENGINE = "engine"
    REWARD = "reward"
    ENVIRONMENT = "environment"
    AGENT = "agent"
    """External agents, or the task's `agent()`."""
    WEIGHTS = "weights"
    """A push of weights."""
    BUFFER = "buffer"
    OPERATOR = "operator"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One daemon, or part of one, on which others wait."""

    on: On
    name: str
    """`rollout-1`, `rollout-1's engine`, `trainer-0`, ..."""
    seconds: float
    what: str
    """`no token for 28 s`"""
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds after which waiting is worth a line."""

    stall_s: float
    """For what answers or advances several times in this time when it works."""
    work_s: float
    """For work whose time depends on the job: rewards, tools, a push, an optimizer step."""

    @classmethod
    def of(cls, *, heartbeat_s: float) -> Limits:
        """For a job with this interval of heartbeats."""
        return cls(stall_s=max(5.0, 6 * heartbeat_s), work_s=max(10.0, 12 * heartbeat_s))
