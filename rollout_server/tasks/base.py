"""What a model is asked and what its answer is worth: the one file that a researcher has to read to add a task.

A task is a frozen dataclass: its fields are its settings, so a misspelt key of `task:` in the configuration is refused by name.
It is a pure function of `(seed, split, index)`. That is what lets the buffer own the order of prompts as plain integers, a killed
server be replaced without a hand-over, and a reward process rebuild the example instead of being sent it. Left out on purpose:
iterators, shuffling and epochs (the buffer's), tokenization (`prompts.py`), time limits (`rewards.py`). Tasks import no torch.

A task of one's own, with its reward, named in the configuration as `task: {_target_: my_module.Add, digits: 3}`:

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
"""`train` prompts are learned from; `eval` prompts are held out, and the task promises that they never appear in `train`."""

ChatMessage = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""

_FINGERPRINT_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with what its reward needs to know."""

    prompt: str | list[ChatMessage]
    """Plain text (base and character models), or chat messages for the tokenizer's chat template."""
    answer: Any
    """Whatever `reward` compares with; never leaves the process that made it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that `reward` wants."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set and its reward. Subclasses add their settings as fields and write `example` and `reward`."""

    seed: int = 0
    """The job's seed, unless the task's own settings name one."""
    num_train: int = 1_000_000
    """Training prompts: indices 0 .. num_train-1 of split `train`."""
    num_eval: int = 1024
    """Held-out prompts: indices 0 .. num_eval-1 of split `eval`."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; with sampling.max_new_tokens it sizes the engine's context. A longer prompt fails its sample."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_eval", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name}={getattr(self, name)}: must be at least 1")

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """The example at `index` of `split`: the same for the same arguments, in every process, whatever was asked before."""

    @abstractmethod
    def reward(self, example: Example, completion: str) -> float | dict[str, float]:
        """What `completion` (text without special tokens) is worth: a finite number, or named parts whose sum is the reward.

        Runs in a worker process under `rollout.reward_timeout_s`; it may raise or hang: the sample counts as failed, nothing else.
        """

    def rng(self, split: Split, index: int) -> random.Random:
        """A random generator of this example's own (str seeds are hashed by value, unlike `hash()`, so all processes agree)."""
        return random.Random(f"{self.seed}/{split}/{index}")

    def fingerprint(self) -> str:
        """16 hex digits over settings and first examples: two servers with different data must not feed one job.

        Raises ConfigError if `example` raises or is not a pure function of its arguments.
        """
        probe = self._probe()
        if probe != self._probe():
            raise ConfigError(
                f"task {type(self).__name__}: example() gave two different answers for the same index; use self.rng(split, index)"
            )
        return hashlib.sha256(probe.encode()).hexdigest()[:16]

    def _probe(self) -> str:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        count = {"train": self.num_train, "eval": self.num_eval}
        examples = [
            self._first(split, i)
            for split in get_args(Split)
            for i in range(min(_FINGERPRINT_EXAMPLES, count[split]))
        ]
        parts = [type(self).__qualname__, settings, [(e.prompt, e.answer) for e in examples]]
        return json.dumps(parts, sort_keys=True, default=repr)

    def _first(self, split: Split, index: int) -> Example:
        try:
            return self.example(split, index)
        except Exception as error:  # a researcher's code may raise anything; at the start of a job it is a mistake to be mended
            raise ConfigError(
                f"task {type(self).__name__}: example({split!r}, {index}) raised {type(error).__name__}: {error}"
            ) from error


TASKS = Registry[Task](
    "task",
    Task,  # type: ignore[type-abstract]
    elsewhere={
        "sort": "rollout_server.tasks.sort.SortTask",
        "reasoning_gym": "rollout_server.tasks.reasoning_gym.ReasoningGymTask",
    },
)
"""Imported only when asked for, so that an extra is needed only by those who use it."""


def make_task(settings: Mapping[str, Any], *, seed: int) -> Task:
    """The task that the configuration's `task` section names. Raises ConfigError."""
    return TASKS.build(settings, job={"seed": seed})
