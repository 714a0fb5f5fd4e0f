"""A job under a virtual clock: servers with slots, samples of long-tailed duration, a trainer, failures.

A subclass decides which samples start and which are trained on: the project's own ledger
(`simulation_rules.LedgerRule`), or one of the baselines.

The time of a sample does not depend on the server's other work, and each second of it is one token. All
servers get new weights `push_s` after a step; samples in progress continue, so their tokens have the ages of
several versions. A server fails with a constant rate, loses its samples, and comes back after `repair_s`.
"""

from __future__ import annotations

import heapq
import math
import random
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Any

_LONGEST_STEPS = 200
"""A step that takes this many times the limit will not end."""
TURNS_A_SAMPLE = 100
"""The rule acts this often within the mean time of a sample: events in between are handled together."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes and times of a simulated job."""

    num_servers: int = 64
    slots: int = 8
    """Samples that a server makes at the same time."""
    queue: int = 8
    """Samples that wait at a server for a slot: leases cover whole groups, and slots become free one at a
    time."""
    groups_per_step: int = 64
    group_size: int = 4
    max_staleness: int = 4
    close_after: int = 4
    """Of `overdue: close`."""
    mean_s: float = 60.0
    """Mean time of a sample."""
    tail: str = "lognormal"
    """`lognormal` | `pareto`"""
    spread: float = 1.0
    """Log-normal: standard deviation of the log. Pareto: the exponent."""
    longest: float = 0.0
    """Log-normal: no sample takes longer than this multiple of what the mean would be without a limit. Longer
    ones are drawn again, and all times are scaled so that the mean is `mean_s`. 0: no limit."""
    step_s: float = 60.0
    """The trainer's time for a step."""
    push_s: float = 2.0
    failures_an_hour: float = 0.05
    """Failures per hour of each server."""
    repair_s: float = 120.0
    seed: int = 0

    @property
    def samples_a_step(self) -> int:
        """Number of samples that a step trains on."""
        return self.groups_per_step * self.group_size

    @property
    def up(self) -> float:
        """Share of the time in which a server works."""
        return 1 / (1 + self.failures_an_hour / 3600 * self.repair_s)

    @property
    def generation_step_s(self) -> float:
        """Time in which all slots make the samples of a step, if no slot ever waits."""
        return self.samples_a_step * self.mean_s / (self.num_servers * self.slots * self.up)

    @property
    def limit_step_s(self) -> float:
        """The shortest possible time of a step: that of the slower of the two pools."""
        return max(self.step_s, self.generation_step_s)

    def duration_s(self, random_: random.Random) -> float:
        """Time of one sample."""
        if self.tail == "pareto":
            return self.mean_s * (self.spread - 1) / self.spread * random_.paretovariate(self.spread)
        while (drawn := math.exp(random_.gauss(-(self.spread**2) / 2, self.spread))) > (
            self.longest or drawn
        ):
            pass
        return self.mean_s * drawn / _mean_within(self.spread, self.longest)

    def quantile_s(self, share: float) -> float:
        """The time within which this share of samples ends, without the limit `longest`."""
        if self.tail == "pareto":
            return self.mean_s * (self.spread - 1) / self.spread * (1 - share) ** (-1 / self.spread)
        return self.mean_s * math.exp(-(self.spread**2) / 2 + self.spread * NormalDist().inv_cdf(share))


@cache
def _mean_within(spread: float, longest: float) -> float:
    """Mean of a log-normal variable of mean 1, given that it is at most `longest`."""
    if not longest:
        return 1.0
    limit = math.log(longest) / spread
    return NormalDist().cdf(limit - spread / 2) / NormalDist().cdf(limit + spread / 2)


@dataclass(kw_only=True)
class Sample:
    """One sample in progress."""

    work: Any
    """The rule's identifier of the sample."""
    began_s: float
    weights_step: int
    """Step of the weights with which it started."""
    seconds: float = 0.0
    """Its duration, once it is complete."""
    runs: list[tuple[int, float]] = field(default_factory=list)
    """(step of the weights, seconds for which they sampled it), in order, once it is complete."""


class Server:
    """The slots and the weights of a server."""

    def __init__(self, number: int, slots: int) -> None:
        self.number = number
        self.name = f"rollout-{number}"
        self.free = slots
        self.life = 1
        """Increases with each failure: events from before a failure are void."""
        self.is_up = True
        self.weights_step = 0
        self.running: dict[int, Sample] = {}
        self.waiting: deque[Any] = deque()
        """The rule's identifiers of its waiting samples."""


class Simulation(ABC):
    """One run. `run` it once, then read the results."""

    masks = False
    """True if tokens beyond the bound are context only."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.servers = [Server(number, job.slots) for number in range(job.num_servers)]
        self.now_s = 0.0
        self.step = 0
        self.lags: Counter[int] = Counter()
        """Lag of the oldest token that was trained on -> samples."""
        self.trained_s = self.lost_s = self.dropped_s = 0.0
        """Seconds of samples: in a step, lost with servers, dropped as too old."""
        self.num_untrained = 0
        """Samples of steps none of whose tokens was trained on, and complete samples that were dropped."""
        self.step_ends: list[float] = []
        self._random = random.Random(job.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_events = self._num_samples = 0
        self._is_training = self._events_begun = False
        self._turn_s = job.mean_s / TURNS_A_SAMPLE
        self._pushes_s = [0.0]
        """Times at which the servers got the weights of each step."""
        self._within_s: list[float] = []
        """For each step, seconds of its samples that were sampled within the bound."""
        self._num_running, self._num_slots = 0, job.num_servers * job.slots
        self._counted_s = self._busy_s = self._open_s = 0.0
        """Until the time of the last count: seconds of samples in slots, and seconds of slots."""
        self._counts: list[tuple[float, float]] = []
        """The last two at the end of each step."""

    @abstractmethod
    def dispatch(self) -> Iterable[tuple[Server, Any]]:
        """The samples that now go to servers, with their servers."""

    @abstractmethod
    def ended(self, server: Server, sample: Sample) -> None:
        """A sample is complete."""

    @abstractmethod
    def lost(self, server: Server, work: list[Any]) -> None:
        """A server has failed with these samples, running or waiting."""

    @abstractmethod
    def take(self) -> list[Sample] | None:
        """The samples of the next step, which are then trained on; None if they are not complete yet."""

    def returned(self, server: Server) -> None:  # noqa: B027
        """A server works again; it has the newest weights."""

    def trained(self) -> None:  # noqa: B027
        """The step `self.step - 1` is done."""

    def pushed(self, server: Server) -> None:  # noqa: B027
        """A server has new weights."""

    def run(self, num_steps: int) -> None:
        """Simulates until this many steps are done. Raises RuntimeError if a step takes too long."""
        if not self._events_begun:
            self._events_begun = True
            for server in self.servers:
                self._fail_later(server)
            self._turn()
        limit_s = self.now_s + _LONGEST_STEPS * (num_steps - self.step + 1) * self.job.limit_step_s
        while self.step < num_steps:
            self.now_s, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
            if self.now_s > limit_s:
                raise RuntimeError(f"no progress after step {self.step}")

    def at(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """Schedules an event."""
        self._num_events += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._num_events, act, arguments))

    def results(self) -> dict[str, Any]:
        """Figures of the run after its first tenth, which fills the pipeline."""
        first = len(self.step_ends) // 10
        step_s = (self.step_ends[-1] - self.step_ends[first]) / (len(self.step_ends) - 1 - first)
        num = sum(self.lags.values())
        total_s = self.trained_s + self.lost_s + self.dropped_s
        of_limit = self.job.limit_step_s / step_s
        within_s = self._within_s[first + 1 : len(self.step_ends)]
        full_s = self.job.samples_a_step * self.job.mean_s * len(within_s)
        busy_s, open_s = (self._counts[-1][index] - self._counts[first][index] for index in (0, 1))
        return {
            "job": asdict(self.job),
            "steps": self.step,
            "step_s": round(step_s, 3),
            "of_limit": round(of_limit, 4),
            "goodput": round(of_limit * sum(within_s) / full_s, 4),
            "beyond_tokens": round(1 - sum(self._within_s) / self.trained_s, 5),
            "untrained": round(self.num_untrained / (num + self.num_untrained), 5),
            "lag_mean": round(sum(lag * count for lag, count in self.lags.items()) / num, 3),
            "lag_max": max(self.lags),
            "beyond_bound": round(
                sum(count for lag, count in self.lags.items() if lag > self.job.max_staleness) / num, 5
            ),
            "waited_s": round(step_s - self.job.limit_step_s, 2),
            "idle_generation": round(1 - busy_s / open_s, 4),
            "idle_trainer": round(1 - self.job.step_s / step_s, 4),
            "lost_share": round(self.lost_s / total_s, 5),
            "dropped_share": round(self.dropped_s / total_s, 5),
        }

    def _turn(self) -> None:
        for server, work in self.dispatch():
            if server.is_up:  # else there is no receiver for the message
                server.waiting.append(work)
                self._fill(server)
        self._begin_step()
        self.at(self._turn_s, self._turn)

    def _begin_step(self) -> None:
        if not self._is_training and (samples := self.take()) is not None:
            self._is_training = True
            self._within_s.append(sum(map(self._train, samples)))
            self.at(self.job.step_s, self._trained)

    def abort(self, server: Server, is_aborted: Callable[[Any], bool]) -> None:
        """Ends the samples of a server whose identifiers `is_aborted` accepts."""
        self._count()
        for number, sample in [*server.running.items()]:
            if is_aborted(sample.work):
                del server.running[number]
                server.free += 1
                self._num_running -= 1
                self.dropped_s += self.now_s - sample.began_s
        server.waiting = deque(work for work in server.waiting if not is_aborted(work))
        self._fill(server)

    def drop(self, sample: Sample) -> None:
        """Counts a complete sample that is not trained on."""
        self.dropped_s += sample.seconds
        self.num_untrained += 1

    def _train(self, sample: Sample) -> float:
        """Counts a sample of the step; returns the seconds of its tokens within the bound."""
        self.trained_s += sample.seconds
        first = self.step - self.job.max_staleness
        within = [run for run in sample.runs if run[0] >= first]
        trained = within if self.masks else sample.runs
        if trained:
            self.lags[self.step - trained[0][0]] += 1
        else:
            self.num_untrained += 1
        return sum(seconds for _, seconds in within)

    def _count(self) -> None:
        """Adds the time since the last count. Call it before a slot is taken, freed or lost."""
        passed_s = self.now_s - self._counted_s
        self._busy_s += self._num_running * passed_s
        self._open_s += self._num_slots * passed_s
        self._counted_s = self.now_s

    def _fill(self, server: Server) -> None:
        self._count()
        while server.is_up and server.free and server.waiting:
            server.free -= 1
            self._num_running += 1
            self._num_samples += 1
            number = self._num_samples
            server.running[number] = Sample(
                work=server.waiting.popleft(), began_s=self.now_s, weights_step=server.weights_step
            )
            self.at(self.job.duration_s(self._random), self._ended, server, server.life, number)

    def _ended(self, server: Server, life: int, number: int) -> None:
        if server.life == life and (sample := server.running.pop(number, None)) is not None:
            self._count()
            server.free += 1
            self._num_running -= 1
            sample.seconds = self.now_s - sample.began_s
            sample.runs = self._runs(sample)
            self.ended(server, sample)
            self._fill(server)

    def _runs(self, sample: Sample) -> list[tuple[int, float]]:
        runs, began_s = [], sample.began_s
        for step in range(sample.weights_step + 1, len(self._pushes_s)):
            runs.append((step - 1, self._pushes_s[step] - began_s))
            began_s = self._pushes_s[step]
        return [*runs, (sample.weights_step + len(runs), self.now_s - began_s)]

    def _fail_later(self, server: Server) -> None:
        rate = self.job.failures_an_hour / 3600
        if rate:
            self.at(self._random.expovariate(rate), self._fail, server)

    def _fail(self, server: Server) -> None:
        self._count()
        samples = list(server.running.values())
        self._num_running -= len(samples)
        self._num_slots -= self.job.slots
        self.lost_s += sum(self.now_s - sample.began_s for sample in samples)
        server.running.clear()
        waiting, server.waiting = [*server.waiting], deque()
        server.life += 1
        server.is_up, server.free = False, 0
        self.lost(server, [sample.work for sample in samples] + waiting)
        self.at(self.job.repair_s, self._return, server)

    def _return(self, server: Server) -> None:
        self._count()
        self._num_slots += self.job.slots
        server.is_up, server.free, server.weights_step = True, self.job.slots, self.step
        self.returned(server)
        self._fail_later(server)

    def _trained(self) -> None:
        self.step += 1
        self.step_ends.append(self.now_s)
        self._count()
        self._counts.append((self._busy_s, self._open_s))
        self._is_training = False
        self.trained()
        self.at(self.job.push_s, self._pushed, self.step)
        self._begin_step()

    def _pushed(self, step: int) -> None:
        self._pushes_s.append(self.now_s)
        for server in self.servers:
            if server.is_up and server.weights_step < step:
                server.weights_step = step
                self.pushed(server)
