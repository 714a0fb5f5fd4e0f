"""Tasks: prompts and their reward functions. Read this file before adding a task.

A task is a frozen dataclass: its fields are its settings, so an unknown key of `task:` in the configuration
is refused by name. Examples are a pure function of `(seed, split, index)`. So the buffer can manage the order
of prompts as plain integers, a killed server can be replaced without transferring state, and a reward process
rebuilds the example instead of receiving it. Other modules implement shuffling and epochs (buffer/prompts/),
tokenization (rendering/prompt_renderer.py) and time limits (workers/reward_pool.py). Tasks import no torch.

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
import inspect
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

from areal_like.errors import RAISED_BY_TASKS, ConfigError
from areal_like.registry import Registry
from areal_like.trajectory import FinishReason
from areal_like.wire.fingerprint import canonical_json
from areal_like.wire.records import MAX_LABEL_CHARS
from rollout_server.agents.base import Session, is_agent
from rollout_server.environments.base import Environment, Message

Split = Literal["train", "eval"]
"""`train` prompts are for training; `eval` prompts are held out, so none of them may be in `train`."""

_FINGERPRINT_EXAMPLES = 4
_NOT_EXAMPLES = frozenset({"external", "gold_reward"})
"""Settings that are left out of a fingerprint: who makes the samples, and what else is recorded."""

Prompt = str | list[Message]
"""Plain text (base and character models), or chat messages for the tokenizer's chat template."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data source of a mixture."""

    size: int
    """Number of training prompts."""
    weight: float


class FittingPrompts(Protocol):
    """Measures prompts in batches, to find those that are short enough for the model."""

    @property
    def key(self) -> str:
        """Identifies everything that the results depend on (tokenizer, template). Empty: unknown."""

    def num_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Returns the length of each prompt. Raises ValueError for one that cannot be rendered."""

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that fits into the engine's context, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt, with the data that its reward needs."""

    prompt: Prompt
    answer: Any
    """The value that `reward` compares the completion with. It is not sent to other processes, except to
    external agents."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Other data for `reward`."""
    label: str = ""
    """Metrics are reported by label if a job has several; at most 64 printable characters."""
    max_new_tokens: int = 0
    """Longest completion in tokens, if below the job's `sampling.max_new_tokens`; 0: the job's. Not for
    examples with an environment."""

    def __post_init__(self) -> None:
        if self.label and (len(self.label) > MAX_LABEL_CHARS or not self.label.isprintable()):
            raise ConfigError(f"label {self.label!r}: use at most {MAX_LABEL_CHARS} printable characters")


class Completion(str):
    """The policy's completion, as passed to `reward`: a string with further attributes.

    The string is the text of the last turn, without special tokens.
    """

    __slots__ = ("finish_reason", "messages", "raw_text", "token_ids", "turn_lengths")

    raw_text: str
    """The sampled tokens of the last turn as text, special tokens included (markers of tool calls, ...)."""
    messages: Sequence[Message]
    """The whole conversation, including the last turn."""
    token_ids: Sequence[int]
    """The sampled tokens of all turns."""
    turn_lengths: Sequence[int]
    """Number of sampled tokens of each turn."""
    finish_reason: FinishReason

    def __new__(
        cls,
        text: str,
        *,
        raw_text: str = "",
        messages: Sequence[Message] = (),
        token_ids: Sequence[int] = (),
        turn_lengths: Sequence[int] = (),
        finish_reason: FinishReason = FinishReason.STOP,
    ) -> Self:
        """`raw_text`: if empty, `text` is used."""
        completion = super().__new__(cls, text)
        completion.raw_text = raw_text or text
        completion.messages = messages
        completion.token_ids = token_ids
        completion.turn_lengths = turn_lengths
        completion.finish_reason = finish_reason
        return completion


@dataclass(frozen=True, kw_only=True)
class Score:
    """A reward with its details. The sample's reward is `value` plus the sums of `turns`, `tokens` and
    `steps`."""

    value: float = 0.0
    """Reward of the whole sample, credited to its last sampled token."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named parts of the reward, for metrics."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Named numbers that are not part of the reward."""
    turns: Sequence[float] = ()
    """Reward of each turn of the policy; empty: no turn has one."""
    tokens: Sequence[float] = ()
    """Reward of each sampled token, over all turns in order; empty: no token has one."""
    steps: Sequence[tuple[int | str, float]] = ()
    """(end, reward) of each step of the completion, in order; empty: no step has one.

    `end`: number of characters of the completion up to the end of the step, or the step's text, before which
    only whitespace may come. The reward is credited to the token in which the step's last character ends. Not
    together with `tokens`."""


Rewarded = float | Mapping[str, float] | Score
"""What `Task.reward` may return."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A data set and its reward. Subclasses add settings as fields and implement `example` and `reward`,
    or `environment` for conversations of several turns."""

    seed: int = 0
    """The job's seed, unless the task's settings contain another."""
    num_train: int = 1_000_000
    """Training prompts: indices 0 .. num_train-1 of split `train`."""
    num_eval: int = 1024
    """Held-out prompts: indices 0 .. num_eval-1 of split `eval`."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens; it determines the engine's context length. Samples of longer prompts fail."""
    sandbox: str = "bwrap"
    """The job's `rewards.sandbox`: `rollout_server.sandbox.make_sandbox(task.sandbox)` runs a program."""
    external: bool = False
    """True if external agents make the samples: they claim them from the rollout servers (POST /sessions)."""

    least: ClassVar[Mapping[str, int]] = {"num_train": 1, "num_eval": 1, "max_prompt_tokens": 1}
    """Minimum values of settings."""

    def __post_init__(self) -> None:
        for setting, least in self.least.items():
            if getattr(self, setting) < least:
                raise ConfigError(f"task.{setting}={getattr(self, setting)}: must be at least {least}")
        if not (self.has_reward or self.has_environment or self.uses_sessions):
            raise ConfigError(f"task {type(self).__name__}: implement reward(), environment() or agent()")
        if self.has_environment and self.uses_sessions:
            raise ConfigError(
                f"task {type(self).__name__} has an environment(): leave out agent(), and task.external=true"
            )
        if self.has_agent and not is_agent(type(self).agent):
            raise ConfigError(f"task {type(self).__name__}: write `async def agent(self, example, session)`")

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """Returns the example at `index` of `split`. It must not depend on the process or on earlier
        calls."""

    def reward(self, example: Example, completion: Completion) -> Rewarded | Awaitable[Rewarded]:
        """Returns the reward of `completion`: a number, named parts to be summed, or a `Score`.

        Runs in a worker process with the time limit `rollout.reward_timeout_s`. If it raises or hangs, only
        its own sample fails. It may be `async def`: one process then computes several at the same time
        (`rollout.reward_concurrency`), for rewards that wait for a service. It is optional for a task with an
        environment, where its value is added to the rewards of the environment's steps.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither reward() nor environment()")

    def environment(self, example: Example) -> Environment | None:
        """Returns the environment for one sample of `example`; None: one prompt, one completion.

        Called in the environment's process, which rebuilds the example.
        """
        return None

    async def agent(self, example: Example, session: Session) -> float | Mapping[str, float] | Score | None:
        """Makes one sample of `example`. It may be any program that uses OpenAI's API or Anthropic's, with
        `session` as its model.

        Runs in a process of its own, which rebuilds the example, and has OPENAI_BASE_URL, OPENAI_API_KEY,
        ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY set. Returns the reward; None: the value that `reward`
        computes from the last completion. If the task has a `reward`, its value is added to the agent's.
        """
        raise NotImplementedError(f"{type(self).__name__} has no agent()")

    @property
    def sources(self) -> tuple[Source, ...]:
        """Returns the parts of a mixture in the order of their indices, `num_train` prompts in total;
        otherwise empty."""
        return ()

    def part_of(self, split: Split, index: int) -> str:
        """Returns the name of the mixture's part that has an example; otherwise empty."""
        return ""

    @property
    def content(self) -> list[str]:
        """Returns fingerprints of the data that the task read from files; part of its own fingerprint."""
        return []

    def without_long_prompts(self, fitting: FittingPrompts) -> Self:
        """Returns the task without prompts that do not fit, for tasks over stored rows.

        Called once in a server, before it registers. Raises ConfigError if none is left.
        """
        return self

    def settings_of_workers(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings from which a worker process creates exactly this task. `settings`: the task's
        own."""
        return settings

    def check(self) -> None:  # noqa: B027, most tasks need nothing
        """Raises ConfigError if the task needs something that this machine does not have.

        Rollout servers call it once at start. A reward that runs programs checks its sandbox here:
        `make_sandbox(self.sandbox).check()`.
        """

    @property
    def has_environment(self) -> bool:
        """True if the task's samples are conversations with an environment."""
        return type(self).environment is not Task.environment

    @property
    def has_agent(self) -> bool:
        """True if the task's samples are made by its `agent`."""
        return type(self).agent is not Task.agent

    @property
    def uses_sessions(self) -> bool:
        """True if samples are made in sessions, by `agent` or by external agents."""
        return self.has_agent or self.external

    @property
    def has_reward(self) -> bool:
        """True if the task computes a reward in addition to those of an environment's steps."""
        return type(self).reward is not Task.reward

    def is_rewarded(self, example: Example) -> bool:
        """True if the task computes a reward for this example; a mixture has examples of several tasks."""
        return self.has_reward

    @property
    def has_async_reward(self) -> bool:
        """True if `reward` returns an awaitable. Override it if `reward` does so without being `async
        def`."""
        return inspect.iscoroutinefunction(self.reward)

    def rng(self, split: Split, index: int) -> random.Random:
        """Returns a random generator for this example, seeded identically in every process."""
        # Random hashes a str seed by content; `hash()` differs between processes.
        return random.Random(f"{self.seed}/{split}/{index}")

    def fingerprint(self) -> str:
        """Returns a hash of 16 hex digits over settings and first examples; it must be equal in all servers
        of a job.

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
        # These settings do not change examples, so the fingerprint equals that of releases without them.
        names = [one.name for one in dataclasses.fields(self) if one.init and one.name not in _NOT_EXAMPLES]
        settings = {name: getattr(self, name) for name in names}
        num_examples = {"train": self.num_train, "eval": self.num_eval}
        examples = [
            self._checked_example(split, index)
            for split in get_args(Split)
            for index in range(min(_FINGERPRINT_EXAMPLES, num_examples[split]))
        ]
        shown = [(example.prompt, example.answer) for example in examples]
        return canonical_json([type(self).__qualname__, settings, shown, self.content], default=_described)

    def _checked_example(self, split: Split, index: int) -> Example:
        try:
            return self.example(split, index)
        except RAISED_BY_TASKS as error:  # at the start of a job this is the user's mistake
            raise ConfigError(
                f"task {type(self).__name__}: example({split!r}, {index}) raised "
                f"{type(error).__name__}: {error}"
            ) from error


def _described(value: Any) -> Any:
    """Describes a value that is not JSON, identically in every process."""
    if isinstance(value, Set):
        return sorted(map(repr, value))
    # The default repr contains the object's address.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


TASKS = Registry[Task](
    "task",
    Task,  # type: ignore[type-abstract]
    elsewhere={
        "sort": "rollout_server.tasks.sort.SortTask",
        "adding": "rollout_server.tasks.adding.AddingTask",
        "adding_agent": "rollout_server.tasks.adding_agent.AddingAgentTask",
        "coding": "rollout_server.tasks.coding.task.CodingTask",
        "reasoning_gym": "rollout_server.tasks.reasoning_gym.ReasoningGymTask",
        "gymnasium": "rollout_server.tasks.gymnasium.GymnasiumTask",
        "textarena": "rollout_server.tasks.textarena.TextArenaTask",
        "openenv": "rollout_server.tasks.openenv.OpenEnvTask",
        "data": "rollout_server.tasks.data.task.DataTask",
        "mixture": "rollout_server.tasks.mixture.MixtureTask",
        "external": "rollout_server.tasks.external.ExternalTask",
    },
)
"""Tasks are registered by path and imported on use: an optional package is needed only by its own task."""


def make_task(settings: Mapping[str, Any], *, seed: int, sandbox: str = "bwrap") -> Task:
    """Creates the task described by the configuration's `task` section; `sandbox`: `rewards.sandbox`.

    Raises ConfigError.
    """
    return TASKS.build(settings, job={"seed": seed, "sandbox": sandbox})
