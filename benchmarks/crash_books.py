"""Determines the outcome of every trajectory and step of a job whose processes were killed: arithmetic only.

The input is the lines of the journal (benchmarks/crash_job.py) and, for each kill, the benchmark's
observations. A trainer here is one process; it starts at the step from which it resumed and makes its steps
in order, so each `groups_per_step` of the groups that it receives form one step.

A trajectory is *trained* if it is in the last completed version of a step. It is *lost* if it had begun
before a kill and was never trained, although the job continued until everything that could still be trained
was trained. Its loss is attributed to

- the first kill after its beginning, if it never ended (its process died), or the newest kill before it was
  cancelled;
- the newest kill before its end, if `PATIENCE` new steps were then completed without it: it was refused, for
  instance because a token was sampled with weights that the kill has undone;
- otherwise the first kill after its last recorded event: it was in the buffer, or had been trained on in a
  step that was undone, and the kill destroyed it.

Its seconds count from its beginning to its end or, if it never ended, to the kill: agents, tools and engine
worked that long in vain. A trajectory that was started again is a new trajectory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 3
"""max_staleness + 1 of the job: a trajectory that is kept is trained within this many new steps."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9, and the observed effects."""

    role: str
    at_s: float
    over_s: float
    """When the trainer that the kill ended was gone; `at_s` if it ended none. A trainer without a launcher
    continues until its step is complete."""
    last_step: int
    """Newest completed step in metrics.jsonl just after that time."""
    resumed_step: int | None
    """Step with which the next trainer began; None if the trainer survived."""
    answered_s: float
    """Seconds until the killed role worked again: benchmarks/crash_cost.py defines it for each role."""
    caught_up_s: float
    """Seconds until a step was completed that had not been completed before the kill."""

    @property
    def num_undone(self) -> int:
        """Number of completed steps that were lost and are repeated."""
        return 0 if self.resumed_step is None else self.last_step + 1 - self.resumed_step


@dataclass(kw_only=True)
class Attempt:
    """One trajectory."""

    begun_s: float
    maker: int
    done_s: float | None = None
    cancelled_s: float | None = None
    used: list[tuple[int, float]] = field(default_factory=list)
    """(step, when) for each completed step that it was part of, including undone ones."""
    is_trained: bool = False


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one kill."""

    lost_trajectories: int
    """Trajectories that the kill destroyed."""
    lost_complete: int
    """Of these: complete ones, in the buffer, trained in an undone step, or refused."""
    lost_s: float
    """Trajectory-seconds of all lost trajectories."""
    twice_samples: int
    """Samples of undone steps that were trained on again."""
    undone_samples: int
    """Samples of undone steps, no matter whether the same or other samples are trained on in their place."""
    answered_s: float
    caught_up_s: float


def attempts_of(
    journal: Iterable[Mapping[str, Any]], kills: Sequence[Kill], *, groups_per_step: int, last_step: int
) -> dict[int, Attempt]:
    """All trajectories. `last_step`: the newest step that was completed when the journal was read.

    Raises ValueError if the journal does not have the groups of a completed step.
    """
    found: dict[int, Attempt] = {}
    groups: dict[int, list[tuple[float, list[int]]]] = {}
    for line in journal:
        match line["event"]:
            case "begun":
                found[line["attempt"]] = Attempt(begun_s=line["at_s"], maker=line["maker"])
            case "done":
                found[line["attempt"]].done_s = line["at_s"]
            case "cancelled":
                found[line["attempt"]].cancelled_s = line["at_s"]
            case "used":
                groups.setdefault(line["trainer"], []).append((line["at_s"], line["attempts"]))
    changes = [kill for kill in kills if kill.resumed_step is not None]
    firsts = [0, *(kill.resumed_step or 0 for kill in changes)]
    ends = [*(kill.last_step for kill in changes), last_step]
    if len(groups) != len(firsts):
        raise ValueError(f"{len(groups)} trainers have trained, {len(firsts)} were started")
    newest: dict[int, list[int]] = {}
    for first, last, given in zip(firsts, ends, groups.values(), strict=True):
        if len(given) < (last + 1 - first) * groups_per_step:
            raise ValueError(f"steps {first} to {last} have only {len(given)} groups in the journal")
        for step in range(first, last + 1):
            mine = given[(step - first) * groups_per_step :][:groups_per_step]
            newest[step] = [attempt for _, attempts in mine for attempt in attempts]
            for at_s, attempts in mine:
                for attempt in attempts:
                    found[attempt].used.append((step, at_s))
    for attempts in newest.values():
        for attempt in attempts:
            found[attempt].is_trained = True
    return found


def blamed(attempt: Attempt, kills: Sequence[Kill], *, new_steps_s: Sequence[float]) -> int | None:
    """Index of the kill that destroyed a trajectory that was not trained; None if none did.

    `new_steps_s`: when each step was begun for the first time.
    """
    if attempt.cancelled_s is not None and attempt.done_s is None:
        return _newest(kills, before_s=attempt.cancelled_s)
    if attempt.done_s is None:
        return _first(kills, after_s=attempt.begun_s)
    if attempt.used:
        return _undone_by(*attempt.used[-1], kills)
    after = _first(kills, after_s=attempt.done_s)
    end_s = math.inf if after is None else kills[after].at_s
    if sum(attempt.done_s < at_s < end_s for at_s in new_steps_s) >= PATIENCE:
        return _newest(kills, before_s=attempt.done_s)
    return after


def _newest(kills: Sequence[Kill], *, before_s: float) -> int | None:
    return next((at for at in reversed(range(len(kills))) if kills[at].at_s <= before_s), None)


def _first(kills: Sequence[Kill], *, after_s: float) -> int | None:
    return next((at for at, kill in enumerate(kills) if kill.at_s >= after_s), None)


def lost_seconds(attempt: Attempt, kill: Kill) -> float:
    """Time spent on a trajectory that was destroyed."""
    ends = [at_s for at_s in (attempt.done_s, attempt.cancelled_s) if at_s is not None]
    return max(0.0, (min(ends) if ends else kill.at_s) - attempt.begun_s)


def _undone_by(step: int, at_s: float, kills: Sequence[Kill]) -> int:
    return next(
        index
        for index, kill in enumerate(kills)
        if kill.over_s >= at_s and kill.resumed_step is not None and kill.resumed_step <= step
    )


def costs(
    attempts: Mapping[int, Attempt], kills: Sequence[Kill], *, samples_per_step: int, until_s: float
) -> list[Cost]:
    """The cost of each kill. `until_s`: when the job was stopped, which also cancels trajectories."""
    lost: list[list[Attempt]] = [[] for _ in kills]
    firsts: dict[int, float] = {}
    for attempt in attempts.values():
        for step, at_s in attempt.used:
            firsts[step] = min(at_s, firsts.get(step, at_s))
    new_steps_s = sorted(firsts.values())
    twice: Counter[int] = Counter()
    for attempt in attempts.values():
        for step, at_s in attempt.used[:-1]:
            twice[_undone_by(step, at_s, kills)] += 1
        if attempt.is_trained or (attempt.cancelled_s is not None and attempt.cancelled_s > until_s):
            continue
        if (at_kill := blamed(attempt, kills, new_steps_s=new_steps_s)) is not None:
            lost[at_kill].append(attempt)
    return [
        Cost(
            lost_trajectories=len(mine),
            lost_complete=sum(attempt.done_s is not None for attempt in mine),
            lost_s=sum(lost_seconds(attempt, kill) for attempt in mine),
            twice_samples=twice[at],
            undone_samples=kill.num_undone * samples_per_step,
            answered_s=kill.answered_s,
            caught_up_s=kill.caught_up_s,
        )
        for at, (kill, mine) in enumerate(zip(kills, lost, strict=True))
    ]
