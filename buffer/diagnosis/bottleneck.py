"""Finds the pool that limits a healthy job, and the possible gain, from the idle shares of both pools. Pure.

The trainer waits for groups a share w of the time, and the engines have no sequence a share i of the time.
The trainer alone could make 1 / (1 - w) times as many steps, and the engines could sample 1 / (1 - i) times
as much. So more engines help up to 1 / (1 - w), a faster trainer up to 1 / (1 - i), and neither helps where
both wait.

An engine with a single long completion counts as busy. So if the trainer waits although groups are complete,
because positions are reserved for overdue ones (`buffer.overdue=wait`), these groups are the limit, whatever
the engines' shares say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from buffer.diagnosis.facts import JobFacts
from buffer.diagnosis.rules import awaited

_NO_FACTS = JobFacts()
_WINDOW_S = 60.0
_IDLE = 0.1
"""A pool with a smaller idle share is busy: steps and pushes alone leave gaps of this size."""
_ENOUGH_S = 10.0
"""Shortest observed time, in seconds, before advice is given."""


@dataclass(frozen=True, kw_only=True)
class PoolTotals:
    """Totals since the start of the run."""

    at_s: float
    wait_s: float
    """Time in which the slowest rank of the trainer waited for groups."""
    reserved_s: float = 0.0
    """Part of that time in which complete groups could not be recorded (`JobFacts.is_reserving`)."""
    busy_s: float
    """Time in which the engines had sequences, summed over servers."""
    idle_s: float
    """Time in which they had none."""
    starved_s: float
    """Part of the idle time in which all samples of a server waited for rewards or environments."""


class Utilisation:
    """The shares over the last minute."""

    def __init__(self) -> None:
        self._loads: deque[PoolTotals] = deque()

    def observe(self, load: PoolTotals) -> None:
        if self._loads and load.busy_s + load.idle_s < self._loads[-1].busy_s + self._loads[-1].idle_s:
            self._loads.clear()  # a server has left, or counts from zero
        self._loads.append(load)
        while load.at_s - self._loads[0].at_s > _WINDOW_S:
            self._loads.popleft()

    @property
    def trainer_idle(self) -> float | None:
        """Share of the time in which the trainer waited for groups; None: observed for too short a time."""
        return self._share(lambda load: load.wait_s, lambda load: load.at_s)

    @property
    def reserved(self) -> float:
        """Share of the time in which the trainer waited for overdue groups while others were complete."""
        return self._share(lambda load: load.reserved_s, lambda load: load.at_s) or 0.0

    @property
    def generation_idle(self) -> float | None:
        """Share of the time in which engines had no sequence."""
        return self._share(lambda load: load.idle_s, lambda load: load.idle_s + load.busy_s)

    @property
    def starved(self) -> float:
        """Share of the time in which engines had free slots because samples waited for rewards or
        environments."""
        return self._share(lambda load: load.starved_s, lambda load: load.idle_s + load.busy_s) or 0.0

    def _share(
        self, part: Callable[[PoolTotals], float], whole: Callable[[PoolTotals], float]
    ) -> float | None:
        if len(self._loads) < 2 or self._loads[-1].at_s - self._loads[0].at_s < _ENOUGH_S:
            return None
        first, last = self._loads[0], self._loads[-1]
        increase = whole(last) - whole(first)
        return min(1.0, max(0.0, (part(last) - part(first)) / increase)) if increase > 0 else None


def advice(utilisation: Utilisation, *, max_staleness: int, facts: JobFacts = _NO_FACTS) -> str:
    """One or two sentences: which pool is the limit, and what to change; empty if observed for too short a
    time."""
    trainer, engines = utilisation.trainer_idle, utilisation.generation_idle
    if trainer is None or engines is None:
        return ""
    shares = f"the trainer waits {trainer:.0%} of its time for groups, engines idle {engines:.0%}"
    if trainer < _IDLE and engines < _IDLE:
        return f"both pools are busy ({shares}): more of both makes the job faster, of one alone does not"
    if trainer >= _IDLE and utilisation.reserved >= trainer / 2:
        now = f" (now {awaited(facts)})" if awaited(facts) else ""
        close = (
            f"buffer.overdue=close would not wait, but {facts.contradicts_close}"
            if facts.contradicts_close
            else "buffer.overdue=close trains on complete samples without waiting"
        )
        return (
            f"the slowest samples are the limit ({shares}): {utilisation.reserved:.0%} of the time, complete "
            f"groups wait for overdue ones{now}. {close}; a larger max_staleness (now {max_staleness}) gives "
            "slow samples more time"
        )
    if trainer >= _IDLE > engines:
        most = 1 / max(0.02, 1 - trainer)
        return (
            f"the engines are the limit ({shares}): more rollout servers make the job up to {most:.1f} "
            "times as fast; `areal-like rollout RUN --join` adds one"
        )
    if engines >= _IDLE > trainer:
        most = 1 / max(0.02, 1 - engines)
        closed = (
            f", and complete samples for {facts.steps_complete:.1f} steps are waiting, so few new groups "
            "begin"
            if facts.overdue == "close" and facts.steps_complete >= 1
            else ""
        )
        return (
            f"the trainer is the limit ({shares}{closed}): a faster one (more ranks, larger micro-batches) "
            f"makes the job up to {most:.1f} times as fast, and {1 - engines:.0%} of the engines would do"
        )
    if utilisation.starved >= _IDLE:
        return (
            f"rewards or environments are the limit ({shares}, and {utilisation.starved:.0%} of the engines' "
            "time all samples wait for them): more rollout.reward_workers, or a larger rollout.max_episodes"
        )
    if max_staleness == 0:
        return f"the pools take turns ({shares}), as max_staleness=0 demands: 1 or more lets them overlap"
    if facts.overdue == "close":
        return (
            f"each pool waits for the other ({shares}): a larger staleness.close_after (now "
            f"{facts.close_after}) lets more groups begin"
        )
    return (
        f"each pool waits for the other ({shares}): a larger max_staleness (now {max_staleness}) lets "
        "engines work further ahead; otherwise a few long completions delay the steps (response_length_p99)"
    )
