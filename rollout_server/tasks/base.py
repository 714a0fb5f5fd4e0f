"""Tasks: prompts and their reward functions. The one file to read before adding a task.

A task is a frozen dataclass: its fields are its settings, so an unknown key of `task:` in the configuration
is refused by name. Examples are a pure function of `(seed, split, index)`. Therefore the buffer can own the
order of prompts as plain integers, a killed server can be replaced without transferring state, and a reward
process rebuilds the example instead of receiving it. Other modules implement shuffling and epochs
(buffer/prompts/), tokenization (episodes/prompt_renderer.py) and time limits (rewards/pool.py). Tasks import
no torch.

Your own task, configured as `task: {_target_: my_module.Add, digits: 3}`:

    @dataclass(frozen=True, kw_only=True)
    class Add(Task):
        digits: int = 2

        def example(self, split: Split, index: int) -> Example:
            rng = self.rng(split, index)
            a, b = (rng.randrange(10**self.digits) for _ in range(2))
            return Example(prompt=f"{a}+{b}=", answer=a + b)

        def reward(self, example: Example, completion: str) -> float:
            return float(completion.strip() == str(example.answer))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from areal_like.errors import ConfigError
from areal_like.registry import Registry

Split = Literal["train", "eval"]
"""`train` prompts are for training; `eval` prompts are held out, so none of them may be in `train`."""

ChatMessage = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""

_FINGERPRINT_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt, with the data that its reward needs."""

    prompt: str | list[ChatMessage]
    """Plain text (base and character models), or chat messages for the tokenizer's chat template."""
    answer: Any
    """The value that `reward` compares the completion with; it stays in the process that created it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Other data for `reward`."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set and its reward. Subclasses add settings as fields and implement `example` and `reward`."""

    seed: int = 0
    """The job's seed, unless the task's settings contain another."""
    num_train: int = 1_000_000
    """Training prompts: indices 0 .. num_train-1 of split `train`."""
    num_eval: int = 1024
    """Held-out prompts: indices 0 .. num_eval-1 of split `eval`."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; it determines the engine's context length. Samples of longer prompts fail."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_eval", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}={getattr(self, name)}: must be at least 1")

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """The example at `index` of `split`. It must not depend on the process or on earlier calls."""

    @abstractmethod
    def reward(self, example: Example, completion: str) -> float | dict[str, float]:
        """The reward of `completion` (text without special tokens): a number, or named parts to be summed.

        Runs in a worker process with the time limit `rollout.reward_timeout_s`. If it raises or hangs, only
        its own sample fails.
        """

    def rng(self, split: Split, index: int) -> random.Random:
        """A random generator for this example, seeded in the same way in every process."""
        # Random hashes a str seed by its content; `hash()` differs between processes.
        return random.Random(f"{self.seed}/{split}/{index}")

    def fingerprint(self) -> str:
        """16 hex digits over the settings and first examples; must be equal in all servers of a job.

        Raises ConfigError if `example` raises or is not a pure function of its arguments.
        """
        description = self._describe()
        if description != self._describe():
            raise ConfigError(
                f"task {type(self).__name__}: example() returned two different examples for the same index; "
                "use self.rng(split, index)"
            )
        return hashlib.sha256(description.encode()).hexdigest()[:16]

    def _describe(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        num_examples = {"train": self.num_train, "eval": self.num_eval}
        examples = [
            self._checked_example(split, index)
            for split in get_args(Split)
            for index in range(min(_FINGERPRINT_EXAMPLES, num_examples[split]))
        ]
        parts = [type(self).__qualname__, settings, [(e.prompt, e.answer) for e in examples]]
        return json.dumps(parts, sort_keys=True, default=repr)

    def _checked_example(self, split: Split, index: int) -> Example:
        try:
            return self.example(split, index)
        # A task's code may raise anything; at the start of a job that is the user's mistake.
        except Exception as error:
            raise ConfigError(
                f"task {type(self).__name__}: example({split!r}, {index}) raised "
                f"{type(error).__name__}: {error}"
            ) from error


TASKS = Registry[Task](
    "task",
    Task,  # type: ignore[type-abstract]
    elsewhere={
        "sort": "rollout_server.tasks.sort.SortTask",
        "reasoning_gym": "rollout_server.tasks.reasoning_gym.ReasoningGymTask",
    },
)
"""Tasks are registered by path and imported on use: an optional package is needed only by its own task."""


def make_task(settings: Mapping[str, Any], *, seed: int) -> Task:
    """The task described by the configuration's `task` section. Raises ConfigError."""
    return TASKS.build(settings, job={"seed": seed})
