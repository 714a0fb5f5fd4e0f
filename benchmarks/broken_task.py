"""A task for benchmarks/bystanders.py whose rewards fail in every way."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass

from rollout_server.tasks.base import Completion, Example, Split, Task

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m"
"""Renames a terminal's window, clears it, and continues in red."""


@dataclass(frozen=True, kw_only=True)
class BrokenTask(Task):
    """Digits as prompts, a checksum as the reward; with `is_broken` every reward fails.

    One in a hundred hangs, and holds its worker until `rollout.reward_timeout_s` is over.
    """

    is_broken: bool = False

    def example(self, split: Split, index: int) -> Example:
        """Returns a prompt of digits."""
        return Example(prompt="".join(self.rng(split, index).choices("0123456789", k=4)) + "=", answer=None)

    def reward(self, example: Example, completion: Completion) -> float:
        """Returns the checksum; if the task is broken, fails in some way."""
        text = completion.raw_text
        if self.is_broken:
            match zlib.crc32(text.encode()) % 100:
                case 0:
                    time.sleep(3600)
                case number if number < 25:
                    return 1e20
                case number if number < 50:
                    return float("nan")
                case number if number < 75:
                    raise ValueError(f"{ESCAPES}{text}")
                case _:
                    raise RuntimeError("x" * 100_000)
        return sum(map(ord, text)) % 7 / 6
