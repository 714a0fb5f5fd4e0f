"""The shutdown of a job: decides when each process is asked to end and when it is killed. Pure: no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.local_job.actions import Action, Kill, Notice, Terminate


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Processes that end together."""

    names: tuple[str, ...]
    reserve: float
    """Fraction of the whole time (0 to 1) that this stage must leave to the stages after it."""
    grace_s: float = 0.0
    """Seconds that its processes have to end by themselves before they are asked to."""


class Shutdown:
    """Ends the stages one after the other: a stage begins once the previous stage has ended.

    Each process: running -> awaited -> asked to end, after its grace -> ends, or is killed when the stage's
    time is over.
    """

    def __init__(self, stages: Sequence[Stage], *, now_s: float, timeout_s: float) -> None:
        self._stages = stages
        self._end_s, self._timeout_s = now_s + timeout_s, timeout_s
        self._since_s: dict[Stage, float] = {}
        """When each stage began."""
        self._asked: set[str] = set()

    def advance(self, running: Iterable[str], *, now_s: float, reason: str = "") -> list[Action]:
        """Returns the actions that are due now, given the processes that still run.

        `reason`: why they have not ended, for the notice of a process that is killed.
        """
        left_s = self._end_s - now_s
        running = set(running)
        actions: list[Action] = []
        for stage in self._stages:
            living = [name for name in stage.names if name in running]
            since_s = self._since_s.setdefault(stage, now_s)
            if now_s - since_s >= stage.grace_s:
                actions += [Terminate(name) for name in living if name not in self._asked]
                self._asked.update(living)
            if not living:
                continue
            if left_s >= stage.reserve * self._timeout_s:
                break
            actions += [Kill(name) for name in living]
            text = f"{', '.join(living)} did not end in time: killed"
            actions.append(Notice(f"{text}; {reason}" if reason else text))
        return actions

    def awaited(self, running: Iterable[str]) -> list[str]:
        """Running processes of the stages that have begun, by name."""
        return sorted({name for stage in self._since_s for name in stage.names}.intersection(running))
