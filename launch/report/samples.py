"""The worst and the best samples of the newest completed step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from areal_like.errors import ArealError
from areal_like.terminal_text import harmless_name
from launch.formatting import short
from launch.samples.choosing import transcripts
from launch.samples.reading import Selection
from launch.samples.showing import facts
from launch.samples.transcripts import Transcript

_SHOWN_CHARS = 3000
"""Longest part, in characters, that is shown whole; a longer one is cut in the middle."""
_MAX_PARTS = 200


class Sample:
    """One sample as the page shows it."""

    def __init__(self, sample: Transcript) -> None:
        parts = {**sample.reward_parts, **sample.metrics}
        self.rewards = ", ".join(f"{harmless_name(name)} {short(value)}" for name, value in parts.items())
        self.reward = short(sample.reward)
        self.facts = f"ticket {sample.ticket}, sample {sample.sample}: {facts(sample)}"
        self.missing = sample.missing
        self.step = sample.step
        self._parts = [part for segment in sample.segments for part in segment]

    def parts(self) -> Iterator[tuple[bool, str]]:
        """(whether the policy sampled it, text) of each part; long ones are shortened."""
        for part in self._parts[:_MAX_PARTS]:
            yield part.is_sampled, part.shortened(_SHOWN_CHARS, note="")
        if (left_out := len(self._parts) - _MAX_PARTS) > 0:
            yield False, f"\n[{left_out} more parts]"


@dataclass(frozen=True, kw_only=True)
class ShownSamples:
    """The samples, or why there are none."""

    found: list[Sample] = field(default_factory=list)
    problem: str = ""


def read_samples(root: Path) -> ShownSamples:
    """The samples of a run."""
    try:
        return ShownSamples(found=[Sample(one) for one in transcripts(root, Selection())[1]])
    except (ArealError, OSError, sqlite3.Error) as error:
        return ShownSamples(problem=str(error))
