"""The load, equal for every system: trajectories, window, backlog, and the measurement period.

There are eight producers in two processes, because the machine has two cores. Each producer has at most
`window` unacknowledged trajectories, and stops while `backlog` trajectories are acknowledged and not yet
consumed. Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from areal_like.wire.records import Record

NUM_PRODUCERS = 8
NUM_PROCESSES = 2
WARM_UP_S = 2.0
"""Time under load before the measurement begins."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The server of one system."""

    address: str
    pid: int

    @property
    def cpu_s(self) -> float:
        """CPU time that the server has used."""
        return cpu_s(self.pid)


def cpu_s(*pids: int) -> float:
    """CPU time that processes have used, kernel included."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The task of one process, passed as JSON on its command line."""

    role: str
    """`producers` | `consumer`."""
    address: str
    """Address of the server."""
    begin_s: float = 0.0
    end_s: float = 0.0
    """Trajectories acknowledged or consumed between these times are counted."""
    index: int = 0
    """Number of the producers' process."""
    window: int = 32
    """Maximum unacknowledged trajectories of one producer."""
    backlog: int = 8192
    """Maximum trajectories, over all producers, that are acknowledged and not yet consumed."""
    rate_per_s: float = 0.0
    """Trajectories per second of one process; 0: as fast as the window allows."""
    num_tokens: int = 1024
    """Tokens of a trajectory; a record takes 8 bytes for each."""
    io_threads: int = 1
    """ZeroMQ threads of each process."""
    keys: str = ""
    """Directory of the job's keys; empty: without keys."""

    @classmethod
    def from_argv(cls) -> Self:
        """The plan of this process. Prints "ready", then reads the times from stdin."""
        plan = cls(**json.loads(sys.argv[1]))
        print("ready", flush=True)
        begin_s, end_s = map(float, input().split())
        return replace(plan, begin_s=begin_s, end_s=end_s)

    def dumps(self) -> str:
        """The plan as a command line argument."""
        return json.dumps(asdict(self))

    @property
    def names(self) -> list[str]:
        """The producers of this process."""
        each = NUM_PRODUCERS // NUM_PROCESSES
        return [f"rollout-{number}" for number in range(self.index * each, (self.index + 1) * each)]


@dataclass(kw_only=True)
class Tally:
    """Counts and latencies of one process between `begin_s` and `end_s`."""

    plan: Plan
    num_acked: int = 0
    num_consumed: int = 0
    latencies_s: list[float] = field(default_factory=list)
    """Times from sending a trajectory to its acknowledgement."""

    @property
    def is_over(self) -> bool:
        """True when the process should stop."""
        return time.monotonic() >= self.plan.end_s

    def acked(self, sent_s: float) -> None:
        """Counts one trajectory as acknowledged now."""
        now_s = time.monotonic()
        if self.plan.begin_s <= now_s < self.plan.end_s:
            self.num_acked += 1
            self.latencies_s.append(now_s - sent_s)

    def consumed(self, count: int) -> None:
        """Counts `count` trajectories as consumed now."""
        if self.plan.begin_s <= time.monotonic() < self.plan.end_s:
            self.num_consumed += count

    def dumps(self) -> str:
        """The tally as JSON, for the parent process."""
        latencies_ms = [round(1e3 * latency_s, 3) for latency_s in self.latencies_s]
        return json.dumps(
            {"num_acked": self.num_acked, "num_consumed": self.num_consumed, "latencies_ms": latencies_ms}
        )


class Pacer:
    """Limits sending to a steady rate; no limit at rate 0."""

    def __init__(self, rate_per_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._started_s = time.monotonic()
        self._num_sent = 0

    def may_send(self) -> bool:
        """True if one more trajectory is due."""
        return (
            not self._rate_per_s or self._num_sent < (time.monotonic() - self._started_s) * self._rate_per_s
        )

    def sent(self) -> None:
        """Counts one trajectory as sent."""
        self._num_sent += 1


def trajectories(num_tokens: int, *, count: int = 64, version: int = 0) -> list[Trajectory]:
    """Distinct trajectories, so that no system has an advantage from sending the same bytes again."""
    rng = np.random.default_rng(0)
    mask = np.arange(num_tokens) >= num_tokens // 8
    return [
        Trajectory(
            tokens=rng.integers(0, 150_000, num_tokens).astype(np.int32),
            loss_mask=mask.astype(np.uint8),
            logprobs=np.where(mask, -rng.random(num_tokens), 0).astype(np.float32),
            versions=np.where(mask, version, NOT_SAMPLED).astype(np.int32),
            reward=float(number % 2),
            finish_reason=FinishReason.STOP,
        )
        for number in range(count)
    ]


def packed(trajectory: Trajectory, number: int) -> bytes:
    """A serialized trajectory: every producer of bytes has this cost."""
    return Record.of(number, 0, trajectory).data


def unpacked(data: bytes) -> Trajectory:
    """A deserialized trajectory: every consumer has this cost before it can train."""
    return Record.opened(data).trajectory()
