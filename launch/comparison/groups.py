"""Compares the trajectories of one step: groups at the same position, sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, Trajectory
from areal_like.wire.messages.consumer import Group
from launch.comparison.result import Difference
from launch.comparison.rows import are_close
from trainer.replay.recording import SampleRow

Steps = Mapping[int, int]
"""Version -> step that starts with these weights."""
_SHAPE = ("lengths of segments", "ends of turns", "finish reason", "is greedy", "label")


class StepDifferences:
    """The first difference of each kind in one step, and how many samples or groups have one."""

    def __init__(self) -> None:
        self._first: dict[str, Difference] = {}
        self._num: Counter[str] = Counter()

    def add(self, kind: str, text: str, ours: Any = None, theirs: Any = None) -> None:
        """Adds a difference. The values, if given, are appended to the text."""
        self._num[kind] += 1
        if kind not in self._first:
            values = "" if ours is None and theirs is None else f": {ours} / {theirs}"
            self._first[kind] = Difference(kind=kind, text=text + values, run=ours, other=theirs)

    def add_arrays(
        self,
        kind: str,
        what: str,
        ours: NDArray[Any],
        theirs: NDArray[Any],
        *,
        tolerance: float,
        scale: float = 1.0,
    ) -> None:
        """Adds the first elements that differ by more than `tolerance`, relative to themselves or to
        `scale`."""
        close = np.isclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        if not close.all():
            at = int((~close).argmax())
            self.add(kind, f"{what} {at}", ours[at].item(), theirs[at].item())

    def found(self) -> list[Difference]:
        """The differences, each with the number of further ones of its kind."""
        return [
            replace(one, text=f"{one.text} (and {num} more)") if (num := self._num[kind] - 1) else one
            for kind, one in self._first.items()
        ]


def compare_groups(
    found: StepDifferences,
    ours: Group,
    theirs: Group,
    *,
    steps: tuple[Steps, Steps],
    tolerance: float,
) -> None:
    """Adds what differs in two groups at the same position.

    `steps`: version -> step for each run, because runs number their versions independently. `tolerance`: for
    log-probs and rewards.
    """
    where = f"group {ours.position} (tickets {ours.ticket_id} / {theirs.ticket_id})"
    prompts = _prompts(ours), _prompts(theirs)
    if not _are_comparable(found, where, prompts, (len(ours.records), len(theirs.records))):
        return
    for index, (one, another) in enumerate(zip(ours.records, theirs.records, strict=True)):
        if one.data != another.data:
            _compare_samples(
                found,
                one.trajectory(),
                another.trajectory(),
                where=f"group {ours.position}, sample {index}",
                steps=steps,
                tolerance=tolerance,
            )


def compare_sample_rows(
    found: StepDifferences,
    ours: tuple[list[int], list[SampleRow]],
    theirs: tuple[list[int], list[SampleRow]],
    *,
    position: int,
    tolerance: float,
) -> None:
    """Adds the differences of two groups whose records are not kept, from (prompt index of each
    sample, its row)."""
    where = f"group {position}"
    if not _are_comparable(found, where, (ours[0], theirs[0]), (len(ours[1]), len(theirs[1]))):
        return
    for index, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        sample = f"{where}, sample {index}"
        if a.num_sampled != b.num_sampled:
            found.add("tokens", f"{sample}, number of sampled tokens", a.num_sampled, b.num_sampled)
        if a.oldest_step != b.oldest_step:
            found.add("versions", f"{sample}, step of its weights", a.oldest_step, b.oldest_step)
        if not are_close(a.reward, b.reward, tolerance=tolerance):
            found.add("rewards", f"{sample}, reward", a.reward, b.reward)


def _prompts(group: Group) -> list[int]:
    """The prompt index of each sample."""
    of_closed = {closed.ticket_id: closed.prompt_index for closed in group.closed}
    return [of_closed.get(record.ticket_id, group.prompt_index) for record in group.records]


def _are_comparable(
    found: StepDifferences,
    where: str,
    prompts: tuple[list[int], list[int]],
    nums_samples: tuple[int, int],
) -> bool:
    """Adds a difference of prompts (of each sample) or numbers of samples; False if there is one."""
    if prompts[0] != prompts[1]:
        texts = (", ".join(map(str, dict.fromkeys(one))) for one in prompts)
        found.add("prompts", f"{where} has the prompt of index", *texts)
    if nums_samples[0] != nums_samples[1]:
        found.add("groups", f"samples of {where}", *nums_samples)
    return prompts[0] == prompts[1] and nums_samples[0] == nums_samples[1]


def _compare_samples(
    found: StepDifferences,
    ours: Trajectory,
    theirs: Trajectory,
    *,
    where: str,
    steps: tuple[Steps, Steps],
    tolerance: float,
) -> None:
    num_same = _num_same(found, ours, theirs, where=where)
    for name, one, another in zip(_SHAPE, _shape_of(ours), _shape_of(theirs), strict=True):
        if one != another:
            found.add("shape of samples", f"{where}, {name}", one, another)
    version_steps = [
        _steps_of(t.versions[:num_same], of_run) for t, of_run in zip((ours, theirs), steps, strict=True)
    ]
    found.add_arrays(
        "versions", f"{where}, step of the weights that sampled token", *version_steps, tolerance=0.0
    )
    found.add_arrays(
        "behavior log-probs",
        f"{where}, log-prob of token",
        ours.logprobs[:num_same],
        theirs.logprobs[:num_same],
        tolerance=tolerance,
    )
    _compare_rewards(found, ours, theirs, where=where, tolerance=tolerance)


def _shape_of(trajectory: Trajectory) -> tuple[str, ...]:
    ends = tuple(end for end, _ in trajectory.turns)
    values = trajectory.segments, ends, trajectory.finish_reason, trajectory.is_greedy, trajectory.label
    return tuple(map(str, values))


def _num_same(found: StepDifferences, ours: Trajectory, theirs: Trajectory, *, where: str) -> int:
    """The length of the common prefix: tokens that are equal, and equal in whether the policy sampled
    them."""
    num = min(ours.num_tokens, theirs.num_tokens)
    other = (ours.tokens[:num] != theirs.tokens[:num]) | (ours.loss_mask[:num] != theirs.loss_mask[:num])
    if not other.any():
        if ours.num_tokens != theirs.num_tokens:
            found.add("tokens", f"{where}, number of tokens", ours.num_tokens, theirs.num_tokens)
        return num
    at = int(other.argmax())
    of_prompt = not ours.loss_mask[:at].any() and not ours.loss_mask[at] and not theirs.loss_mask[at]
    if ours.tokens[at] == theirs.tokens[at]:
        sampled = int(ours.loss_mask[at]), int(theirs.loss_mask[at])
        found.add("tokens", f"{where}, loss mask of token {at}", *sampled)
    else:
        kind = "prompts" if of_prompt else "tokens"
        found.add(kind, f"{where}, token {at}", int(ours.tokens[at]), int(theirs.tokens[at]))
    return at


def _steps_of(versions: NDArray[np.int32], steps: Steps) -> NDArray[np.int64]:
    unique, inverse = np.unique(versions, return_inverse=True)
    of_unique = [int(v) if v == NOT_SAMPLED else steps.get(int(v), int(v)) for v in unique]
    return np.array(of_unique, dtype=np.int64)[inverse]


def _compare_rewards(
    found: StepDifferences, ours: Trajectory, theirs: Trajectory, *, where: str, tolerance: float
) -> None:
    rewards = np.array([ours.reward]), np.array([theirs.reward])
    found.add_arrays("rewards", f"{where}, reward", *rewards, tolerance=tolerance)
    turns = [np.array([reward for _, reward in t.turns]) for t in (ours, theirs)]
    if turns[0].shape == turns[1].shape:
        found.add_arrays("rewards", f"{where}, reward of turn", *turns, tolerance=tolerance)
    if ours.reward_components != theirs.reward_components:
        found.add("rewards", f"{where}, parts", str(ours.reward_components), str(theirs.reward_components))
    for name in sorted(ours.arrays.keys() | theirs.arrays.keys()):
        arrays = ours.arrays.get(name), theirs.arrays.get(name)
        if arrays[0] is None or arrays[1] is None or arrays[0].shape != arrays[1].shape:
            shapes = ["none" if array is None else str(array.shape) for array in arrays]
            found.add("rewards", f"{where}, array {name}", *shapes)
        elif not np.array_equal(arrays[0], arrays[1]):
            at = int((arrays[0] != arrays[1]).reshape(-1).argmax())
            values = [array.reshape(-1)[at].item() for array in arrays if array is not None]
            found.add("rewards", f"{where}, array {name} at {at}", *values)
