"""The job of benchmarks/crash_cost.py: agents that mostly wait for their tools, and a journal of the job.

Every trajectory records its beginning and its end, and the trainer records the trajectories that it trains
on. The journal is one file of JSON lines. A line is one write to a file opened for appending, so all lines of
a killed process are there, no matter what the buffer keeps.

    {"event": "begun", "attempt": ..., "maker": ..., "at_s": ...}     environment: the episode begins
    {"event": "done", "attempt": ..., "at_s": ...}                    reward: the trajectory is complete
    {"event": "cancelled", "attempt": ..., "at_s": ...}               environment: the episode ended too early
    {"event": "used", "trainer": pid, "attempts": [...], "at_s": ...} trainer: a group is part of its step

`maker` is the process that starts a server's environments, so it differs for each process of a rollout
server. An attempt is a number in the first message of the conversation, so each sample of a group has its own
number; the trainer gets it as a metric of the sample. Times are Unix seconds of one machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.trajectory import Trajectory
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Completion, Example, Score, Split, Task
from trainer.advantages.group import Grpo

TOOL_TIMES = (0.4, 0.7, 2.0)
"""(median, spread, longest): a call takes exp(N(log median, spread)) seconds, at most the longest."""
_TURNS = (1, 2, 3)
_ATTEMPTS = range(10**9, 10**10)


def note(path: str, event: str, **fields: Any) -> None:
    """Appends a line to the journal."""
    line = json.dumps({"event": event, "at_s": time.time(), **fields}) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_journal(path: Path, *, offset: int = 0) -> list[dict[str, Any]]:
    """The complete lines that begin at `offset` bytes or later, by time."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda line: line["at_s"])


class Tools(Environment):
    """One to three calls of a tool that takes time but no CPU."""

    def __init__(self, journal: str) -> None:
        self._journal = journal

    async def reset(self) -> list[Message]:
        """The first message is the attempt's number."""
        self._rng = random.Random(os.urandom(16))
        self._attempt = self._rng.choice(_ATTEMPTS)
        self._left = self._rng.choice(_TURNS)
        note(self._journal, "begun", attempt=self._attempt, maker=os.getppid())
        await self._call()
        return [{"role": "user", "content": str(self._attempt)}]

    async def step(self, reply: Reply) -> Step:
        """The tool's result for one turn."""
        self._left -= 1
        if self._left <= 0:
            return Step(done=True)
        await self._call()
        return Step(messages=[{"role": "user", "content": str(self._left)}])

    async def close(self) -> None:
        """Notes a cancelled attempt if the episode ended early."""
        if self._left > 0:
            note(self._journal, "cancelled", attempt=self._attempt)

    async def _call(self) -> None:
        median_s, spread, longest_s = TOOL_TIMES
        await asyncio.sleep(min(longest_s, median_s * self._rng.lognormvariate(0.0, spread)))


@dataclass(frozen=True, kw_only=True)
class ToolTask(Task):
    """`task._target_=benchmarks.crash_job.ToolTask`. Its reward has no meaning."""

    journal: str

    def example(self, split: Split, index: int) -> Example:
        """The environment writes the prompt."""
        return Example(prompt=f"{index}", answer=None)

    def environment(self, example: Example) -> Environment:
        """The `Tools` environment."""
        return Tools(self.journal)

    def reward(self, example: Example, completion: Completion) -> Score:
        """Notes that the trajectory is complete."""
        attempt = int(completion.messages[0]["content"])
        note(self.journal, "done", attempt=attempt)
        value = sum(map(ord, completion.raw_text)) % 7 / 6
        return Score(value=value, metrics={"attempt": float(attempt)})


@dataclass(frozen=True, kw_only=True)
class JournaledGrpo(Grpo):
    """`advantage._target_=benchmarks.crash_job.JournaledGrpo`: GRPO that notes each group it is given."""

    credits_turns = False
    journal: str

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        """Notes the group, then returns GRPO's advantages."""
        attempts = [int(trajectory.metrics["attempt"]) for trajectory in group]
        note(self.journal, "used", trainer=os.getpid(), attempts=attempts)
        return super().of_group(group)
