"""Several tasks in one job: `task: {name: mixture, tasks: [{weight: 2, name: data, ...}, ...]}`.

Training indices are those of the first task, then those of the second, and so on. The buffer draws the tasks
in proportion to their weights, and each task has its own epochs, so a small data set is repeated more often
(buffer/prompts/order.py). The held-out prompts are interleaved by the same rule, until one of the tasks has
no further ones.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from bisect import bisect_right
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, Self

from areal_like.config.common import fits
from areal_like.data.mixture import MAX_SOURCES, num_draws, place_of
from areal_like.errors import ConfigError
from rollout_server.agents.base import Session, complete_once
from rollout_server.environments.base import Environment, messages_of
from rollout_server.tasks.base import (
    Completion,
    Example,
    FittingPrompts,
    Rewarded,
    Score,
    Source,
    Split,
    Task,
    make_task,
)

_OWN = ("weight", "label", "max_new_tokens")
"""Settings of an entry that do not belong to its task."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One task of the mixture."""

    task: Task
    weight: float
    label: str
    """Label of all its examples; empty: their own, or `name`."""
    name: str
    """Unique in the mixture."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class _PartExample(Example):
    """An example of a part."""

    part: _Part
    own: Example
    """The example as created by the part's task."""


@dataclass(frozen=True, kw_only=True)
class MixtureTask(Task):
    """Tasks with weights. Samples are labeled by their task."""

    least: ClassVar[Mapping[str, int]] = {"num_train": 0, "num_eval": 0, "max_prompt_tokens": 0}

    tasks: Sequence[Any] = ()
    """The tasks, each a mapping with the settings of a task and `weight` (any positive numbers; 1 if absent),
    `label` (else the examples' own labels, or the task's name), and `max_new_tokens` (longest completion)."""
    num_train: int = 0
    """Set to the sum over the tasks."""
    num_eval: int = 0
    """Maximum number of held-out prompts; 0: as many as the weights permit."""
    max_prompt_tokens: int = 0
    """Set to the largest of the tasks."""

    parts: tuple[_Part, ...] = field(init=False, repr=False, compare=False)
    held_out: tuple[_Part, ...] = field(init=False, repr=False, compare=False)
    """Parts with held-out prompts."""
    starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """First training index of each part, and the end."""
    most_eval: int | None = field(init=False, default=None, repr=False, compare=False)
    """`num_eval` as it was configured."""

    def __post_init__(self) -> None:
        if self.num_train or self.max_prompt_tokens:
            raise ConfigError(
                "task.num_train and task.max_prompt_tokens have no effect on a mixture: set them in its tasks"
            )
        entries = self.tasks
        is_list = isinstance(entries, Sequence) and not isinstance(entries, str)
        if not is_list or not 1 < len(entries) <= MAX_SOURCES:
            raise ConfigError(f"task.tasks of a mixture: want a list of 2 to {MAX_SOURCES} tasks")
        parts: list[_Part] = []
        for number, entry in enumerate(entries):
            where = f"task.tasks[{number}]"
            try:
                part = _part(entry, seed=self.seed, sandbox=self.sandbox)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
            same = sum(part.name == other.name for other in parts)
            parts.append(dataclasses.replace(part, name=f"{part.name}_{same + 1}") if same else part)
        if any(part.task.has_environment for part in parts) and any(part.max_new_tokens for part in parts):
            raise ConfigError(
                "task.tasks: max_new_tokens of a task has no effect next to a task with an environment: "
                "set sampling.max_new_tokens and episode.max_tokens"
            )
        self._set_parts(parts)
        if self.has_environment and (self.has_agent or self.external):
            raise ConfigError(
                "task.tasks: a mixture has environments or agents: leave out the tasks with one of the two"
            )
        if not self.external and any(part.task.external for part in parts):
            raise ConfigError(
                "task.tasks: external agents make all samples of a mixture or none: "
                "set task.external=true of the mixture itself, or leave out external tasks"
            )
        super().__post_init__()

    def example(self, split: Split, index: int) -> Example:
        part, own_index = self._place(split, index)
        own = part.task.example(split, own_index)
        return _PartExample(
            prompt=own.prompt,
            answer=own.answer,
            metadata=own.metadata,
            label=part.label or own.label or part.name,
            max_new_tokens=part.max_new_tokens or own.max_new_tokens,
            part=part,
            own=own,
        )

    def reward(self, example: Example, completion: Completion) -> Rewarded | Awaitable[Rewarded]:
        """Returns the reward of the example's task; 0 if only its environment gives rewards."""
        if self.has_async_reward:
            return self._async_reward(example, completion)
        part, own = _of(example)
        return part.task.reward(own, completion) if part.task.has_reward else 0.0

    async def _async_reward(self, example: Example, completion: Completion) -> Rewarded:
        part, own = _of(example)
        scored = part.task.reward(own, completion) if part.task.has_reward else 0.0
        return await scored if isinstance(scored, Awaitable) else scored

    def environment(self, example: Example) -> Environment | None:
        part, own = _of(example)
        return part.task.environment(own)

    async def agent(self, example: Example, session: Session) -> float | Mapping[str, float] | Score | None:
        """Runs the agent of the example's task; without one, requests one completion."""
        part, own = _of(example)
        if part.task.has_agent:
            return await part.task.agent(own, session)
        await complete_once(session, messages_of(own.prompt))
        return None

    @property
    def has_agent(self) -> bool:
        return any(part.task.has_agent for part in self.parts)

    @property
    def has_environment(self) -> bool:
        return any(part.task.has_environment for part in self.parts)

    @property
    def has_reward(self) -> bool:
        return any(part.task.has_reward for part in self.parts)

    def is_rewarded(self, example: Example) -> bool:
        return _of(example)[0].task.has_reward

    @property
    def has_async_reward(self) -> bool:
        return any(part.task.has_reward and part.task.has_async_reward for part in self.parts)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(size=part.task.num_train, weight=part.weight) for part in self.parts)

    def part_of(self, split: Split, index: int) -> str:
        return self._place(split, index)[0].name

    @property
    def content(self) -> list[str]:
        return [part.task.fingerprint() for part in self.parts]

    def check(self) -> None:
        for part in self.parts:
            part.task.check()

    def without_long_prompts(self, fitting: FittingPrompts) -> Self:
        """Returns the mixture without prompts that do not fit, with each task's own limit."""
        fitted = copy.copy(self)
        fitted._set_parts(
            [dataclasses.replace(part, task=part.task.without_long_prompts(fitting)) for part in self.parts]
        )
        return fitted

    def settings_of_workers(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        entries = []
        for part, entry in zip(self.parts, settings["tasks"], strict=True):
            own = {name: entry[name] for name in _OWN if name in entry}
            entries.append({**part.task.settings_of_workers(_settings_of(entry)), **own})
        return {**settings, "tasks": entries}

    def _set_parts(self, parts: Sequence[_Part]) -> None:
        held_out = [part for part in parts if part.task.num_eval]
        most = self.num_eval if self.most_eval is None else self.most_eval
        values = {
            "parts": tuple(parts),
            "held_out": tuple(held_out),
            "starts": (0, *accumulate(part.task.num_train for part in parts)),
            "num_train": sum(part.task.num_train for part in parts),
            "max_prompt_tokens": max(part.task.max_prompt_tokens for part in parts),
            "most_eval": most,
            "num_eval": min(_num_eval(held_out), most) if most > 0 else _num_eval(held_out),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _place(self, split: Split, index: int) -> tuple[_Part, int]:
        """Returns the part that has an example, and its index there."""
        if split == "eval":
            number, own_index = place_of(index, [part.weight for part in self.held_out])
            return self.held_out[number], own_index
        number = bisect_right(self.starts, index) - 1
        if not 0 <= number < len(self.parts):
            raise IndexError(f"training prompt {index} of {self.num_train}")
        return self.parts[number], index - self.starts[number]


def _part(entry: Any, *, seed: int, sandbox: str) -> _Part:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"want a mapping with the settings of a task, got {entry!r}")
    weight, label, tokens = entry.get("weight", 1.0), entry.get("label", ""), entry.get("max_new_tokens", 0)
    if not fits(float, weight) or not 0 < weight < math.inf:
        raise ConfigError(f"weight={weight!r}: use a positive number")
    if not isinstance(label, str) or not fits(int, tokens) or tokens < 0:
        raise ConfigError("want a text for label, and a number of tokens for max_new_tokens")
    task = make_task(_settings_of(entry), seed=seed, sandbox=sandbox)
    if isinstance(task, MixtureTask):
        raise ConfigError("a mixture in a mixture: put its tasks into this one, with their weights")
    if not task.num_train:
        raise ConfigError("the task has no training prompts")
    name = str(entry.get("name") or type(task).__name__)
    Example(prompt="", answer=None, label=label)  # raises for an invalid label
    return _Part(task=task, weight=float(weight), label=label, name=name, max_new_tokens=tokens)


def _settings_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in _OWN}


def _of(example: Example) -> tuple[_Part, Example]:
    assert isinstance(example, _PartExample)
    return example.part, example.own


def _num_eval(parts: Sequence[_Part]) -> int:
    """Returns the largest number of held-out prompts for which no task needs more than it has."""
    weights = [part.weight for part in parts]
    low, high = 0, sum(part.task.num_eval for part in parts)
    while low < high:
        middle = (low + high + 1) // 2
        drawn = num_draws(middle, weights)
        if all(number <= part.task.num_eval for number, part in zip(drawn, parts, strict=True)):
            low = middle
        else:
            high = middle - 1
    return low
