"""Tasks for tests that raise, hang or are slow, in a module that reward workers import quickly."""

import asyncio
import os
import time
import zlib
from dataclasses import dataclass
from typing import Any

from rollout_server.tasks.base import Example, Score, Split, Task


@dataclass(frozen=True, kw_only=True)
class FailingTask(Task):
    """Rewards of examples 1 and 2 raise and hang, examples 7 and 9 raise and hang; other rewards are 0.5."""

    def example(self, split: Split, index: int) -> Example:
        if index == 7:
            raise LookupError("no such example")
        if index == 9:
            time.sleep(3600)
        return Example(prompt=f"{index}=", answer=index)

    def reward(self, example: Example, completion: str) -> float:
        if example.answer == 1:
            raise RuntimeError("cannot judge this")
        if example.answer == 2:
            time.sleep(3600)
        return 0.5


def checksum(completion: str) -> float:
    """0 to 1."""
    return sum(map(ord, completion)) % 7 / 6


@dataclass(frozen=True, kw_only=True)
class Checksum(Task):
    """Prompts of digits. An untrained model gets varying rewards, so there are gradients from step 0 on."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="".join(self.rng(split, index).choices("0123456789", k=4)) + "=", answer=None)

    def reward(self, example: Example, completion: str) -> Any:
        return checksum(completion)


@dataclass(frozen=True, kw_only=True)
class Stepped(Checksum):
    """The first three characters of a completion are steps, and rewarded if they are digits."""

    def reward(self, example: Example, completion: str) -> Score:
        steps = [(end, float(completion[end - 1].isdigit())) for end in range(1, len(completion[:3]) + 1)]
        return Score(value=checksum(completion), steps=steps)


@dataclass(frozen=True, kw_only=True)
class FailsHeldOut(Checksum):
    """Rewards of held-out prompts raise."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=super().example(split, index).prompt, answer=split)

    def reward(self, example: Example, completion: str) -> float:
        if example.answer == "eval":
            raise ValueError("no judge for held-out prompts")
        return checksum(completion)


@dataclass(frozen=True, kw_only=True)
class SlowChecksum(Checksum):
    """Rewards that take time but no CPU: while a job waits for them, other processes can start."""

    def reward(self, example: Example, completion: str) -> float:
        time.sleep(0.03)
        return checksum(completion)


@dataclass(frozen=True, kw_only=True)
class HangingVerifier(Task):
    """Odd prompts are too long for `max_prompt_tokens=16`; the reward hangs on a sixth of all answers."""

    @staticmethod
    def fits(index: int) -> bool:
        return index % 2 == 0

    @staticmethod
    def hangs_on(completion: str) -> bool:
        return sum(map(ord, completion)) % 6 == 0

    def example(self, split: Split, index: int) -> Example:
        digits = "".join(self.rng(split, index).choices("0123456789", k=4))
        return Example(prompt=(digits if self.fits(index) else digits * 10) + "=", answer=None)

    def reward(self, example: Example, completion: str) -> float:
        if self.hangs_on(completion):
            time.sleep(3600)
        return 0.25 + len(completion)


@dataclass(frozen=True, kw_only=True)
class HalfASecond(Checksum):
    """Rewards that take half a second each."""

    def reward(self, example: Example, completion: str) -> float:
        time.sleep(0.5)
        return checksum(completion)


HANGING = (0, 4)
"""Mishaps with which a reward does not end."""


def mishap_of(completion: str) -> int:
    """0 to 99: which mishap the reward of a completion has."""
    return zlib.crc32(completion.encode()) % 100


@dataclass(frozen=True, kw_only=True)
class SlowOnSome(Checksum):
    """Of a hundred rewards two hang, one raises, one ends its process, one is NaN, and three are slow."""

    def reward(self, example: Example, completion: str) -> float:
        match mishap_of(completion):
            case 0 | 4:
                time.sleep(3600)
            case 1:
                raise LookupError("no such answer")
            case 2:
                os._exit(3)
            case 3:
                return float("nan")
            case 5 | 6 | 7:
                time.sleep(0.5)
        return checksum(completion)


@dataclass(frozen=True, kw_only=True)
class SlowService(Checksum):
    """As `SlowOnSome`, and every reward waits for a service."""

    async def reward(self, example: Example, completion: str) -> float:
        await asyncio.sleep(0.1)
        match mishap_of(completion):
            case 0:
                await asyncio.sleep(3600)
            case 1:
                raise LookupError("no such answer")
            case 2:
                os._exit(3)
            case 3:
                return float("nan")
            case 4:
                time.sleep(3600)
        return checksum(completion)


@dataclass(frozen=True, kw_only=True)
class NeverScored(Checksum):
    """Every reward raises."""

    def reward(self, example: Example, completion: str) -> float:
        raise LookupError("nobody can judge this")
