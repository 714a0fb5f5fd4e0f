"""A sample in readable form: its text in parts, its rewards, and versions and lags turn by turn.

Text is decoded part by part, including special tokens, so that the shown text is exactly the tokens that have
log-probs. A character whose bytes are in two parts is shown as U+FFFD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import Trajectory
from areal_like.wire.records import Record
from launch.samples.reading import LocatedRow, Row

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive tokens that are all sampled, or all not."""

    is_sampled: bool
    text: str
    num_tokens: int

    def shortened(self, num_chars: int, *, note: str) -> str:
        """The text, or `num_chars` of it, half from each end. `note`: follows the number of characters left
        out."""
        left_out = len(self.text) - num_chars
        if left_out <= 0:
            return self.text
        half = num_chars // 2
        return f"{self.text[:half]}\n[... {left_out:,} characters{note} ...]\n{self.text[-half:]}"


@dataclass(frozen=True, kw_only=True)
class ShownTurn:
    """One turn of the policy."""

    num_sampled: int
    oldest_version: int
    newest_version: int
    lag: int | None
    """Lag of its oldest token, in optimizer steps; None for an evaluation, or if the version is unknown."""
    reward: float | None
    """None for a sample of one turn, whose reward is the sample's."""


@dataclass(frozen=True, kw_only=True)
class ShownStep:
    """One rewarded step within a turn (`Score.steps`)."""

    text: str
    num_sampled: int
    """Tokens since the step before it in its turn. 0: it ends within the last token of that step."""
    reward: float


@dataclass(frozen=True, kw_only=True)
class Transcript(Row):
    """One sample. Without its record it has only the columns of the ledger's row, and `missing`."""

    lag: int | None
    missing: str = ""
    """Why there is no text."""
    num_tokens: int = 0
    finish_reason: str = ""
    label: str = ""
    reward_parts: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    generation_s: float = 0.0
    reward_s: float = 0.0
    turns: tuple[ShownTurn, ...] = ()
    steps: tuple[ShownStep, ...] = ()
    segments: tuple[tuple[Part, ...], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The sample as plain dicts and lists."""
        return asdict(self)


def transcript(
    row: LocatedRow, record: Record | str, *, decode: Decode, version_steps: Mapping[int, int]
) -> Transcript:
    """The sample of a row. `record`: its record, or the reason as text if there is none."""

    def lag(version: int) -> int | None:
        """The lag of a version; None for an evaluation, whose step is that of its weights."""
        if row.purpose != "train" or row.step is None or version not in version_steps:
            return None
        return row.step - version_steps[version]

    from_row: dict[str, Any] = {one.name: getattr(row, one.name) for one in fields(Row)}
    from_row["lag"] = lag(row.oldest_version)
    if isinstance(record, str):
        return Transcript(**from_row, missing=record)
    trajectory = record.trajectory()
    return Transcript(
        **from_row,
        num_tokens=trajectory.num_tokens,
        finish_reason=trajectory.finish_reason.value,
        label=trajectory.label,
        reward_parts=trajectory.reward_components,
        metrics=trajectory.metrics,
        generation_s=trajectory.generation_s,
        reward_s=trajectory.reward_s,
        turns=tuple(_turns(trajectory, lag)),
        steps=tuple(_steps(trajectory, decode)),
        segments=tuple(
            tuple(_parts(trajectory.tokens[tokens], trajectory.loss_mask[tokens], decode))
            for tokens in trajectory.segment_slices
        ),
    )


def _turns(trajectory: Trajectory, lag: Callable[[int], int | None]) -> list[ShownTurn]:
    ends = [0, *(end for end, _ in trajectory.turns)] if trajectory.turns else [0, trajectory.num_tokens]
    rewards: list[float | None] = [reward for _, reward in trajectory.turns]
    turns = []
    for (start, end), reward in zip(pairwise(ends), rewards or [None], strict=True):
        versions = trajectory.versions[start:end]
        sampled = versions[versions >= 0]
        if len(sampled):
            oldest = int(sampled.min())
            turns.append(
                ShownTurn(
                    num_sampled=len(sampled),
                    oldest_version=oldest,
                    newest_version=int(sampled.max()),
                    lag=lag(oldest),
                    reward=reward,
                )
            )
    return turns


def _steps(trajectory: Trajectory, decode: Decode) -> Iterator[ShownStep]:
    gaps = np.flatnonzero(trajectory.loss_mask == 0) + 1
    before = 0
    for end, reward in trajectory.steps:
        at = int(np.searchsorted(gaps, end, side="right"))  # the last token that was not sampled before it
        start = max(before, int(gaps[at - 1]) if at else 0)
        text = decode(trajectory.tokens[start:end].tolist())
        yield ShownStep(text=text, num_sampled=end - start, reward=reward)
        before = end


def _parts(tokens: NDArray[np.int32], mask: NDArray[np.uint8], decode: Decode) -> list[Part]:
    changes = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [
        Part(is_sampled=bool(mask[start]), text=decode(tokens[start:end].tolist()), num_tokens=end - start)
        for start, end in pairwise(changes)
    ]
