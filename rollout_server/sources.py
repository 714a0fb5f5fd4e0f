"""The tasks of a rollout server and the sources of its samples: for training, and for each evaluation set.

    make_tasks -> sequence_lengths -> without_long_prompts -> running_sources

Tasks are created first, before the slow imports, because that finds most mistakes in a configuration. Prompts
that are too long are left out once the tokenizer is available. Sets without their own task use the job's task
with its worker processes. Any other task has its own worker processes, so that a hanging evaluation reward
does not delay training samples. All are started and checked before the engine starts.

In all mappings the empty name is training, and the others are evaluation sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from areal_like.config import Config, EvalSetConfig
from areal_like.errors import ConfigError, EpisodeError
from areal_like.runtime.waits import PendingWaits
from areal_like.wire.fingerprint import canonical_json
from rollout_server.context_length import longest_evaluation, longest_sequence
from rollout_server.environments.base import Message
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Task, make_task
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_pool import RewardPool

SampleSources = Mapping[str, "SampleSource"]
First = tuple[list[Message], list[dict[str, Any]]]
"""Messages and tools of the first environment."""


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Everything needed to make the samples of training, or of one evaluation set."""

    task: Task
    renderer: PromptRenderer
    """Includes the limit on a prompt's tokens."""
    context_tokens: int
    """Longest sequence, in tokens."""
    rewards: RewardPool
    environments: EnvironmentPool | None = None
    """Processes of `environment()` or `agent()`; None if the task has neither, or external agents."""
    settings: EvalSetConfig | None = None
    """Sampling settings; None: those of training."""


def make_tasks(config: Config) -> dict[str, Task]:
    """Returns the tasks; sets with equal settings share one.

    Raises ConfigError for a task that cannot be made, has no training prompts, or holds out too few.
    """
    task = make_task(config.task, seed=config.seed, sandbox=config.rewards.sandbox)
    task.check()
    if not task.num_train:
        raise ConfigError("task.train is not set: name the rows to train on")
    made = {"": task}
    tasks = {"": task}
    for name, one in config.eval.resolved_sets.items():
        key = _key_of(one)
        if key not in made:
            made[key] = _make(config, name, one)
        tasks[name] = made[key]
        _check_num_prompts(config, name, tasks[name])
    return tasks


def sequence_lengths(config: Config, tasks: Mapping[str, Task], *, max_positions: int) -> dict[str, int]:
    """Returns the longest sequence of training and of each set, in tokens. `max_positions`: the model's
    limit.

    Raises ConfigError as the functions in `context_length` do.
    """
    lengths = {"": longest_sequence(config, tasks[""], max_positions=max_positions)}
    for name, one in config.eval.resolved_sets.items():
        lengths[name] = lengths[""]
        if one.task or one.max_new_tokens:
            lengths[name] = longest_evaluation(config, one, tasks[name], max_positions=max_positions)
    return lengths


def without_long_prompts(
    config: Config, tasks: Mapping[str, Task], renderer: PromptRenderer, *, contexts: Mapping[str, int]
) -> dict[str, Task]:
    """Returns the tasks without prompts that are too long for training or for one of a task's sets.

    Raises ConfigError if too few are left.
    """
    sets = config.eval.resolved_sets
    limits: dict[str, int] = {}
    for name, one in sets.items():
        limit = contexts[name] - (one.max_new_tokens or config.sampling.max_new_tokens)
        limits[_key_of(one)] = min(limit, limits.get(_key_of(one), limit))
    fitted = {"": tasks[""].without_long_prompts(renderer)}
    for name, one in sets.items():
        key = _key_of(one)
        if key not in fitted:
            fitted[key] = tasks[name].without_long_prompts(renderer.limited(limits[key]))
        _check_num_prompts(config, name, fitted[key])
    return {"": fitted[""]} | {name: fitted[_key_of(one)] for name, one in sets.items()}


def content_of(tasks: Mapping[str, Task]) -> str:
    """Returns a hash of 16 hex digits over the examples and data of all sets; empty without sets."""
    prints = {name: task.fingerprint() for name, task in tasks.items()}
    return hashlib.sha256(canonical_json(prints).encode()).hexdigest()[:16] if prints else ""


def _check_num_prompts(config: Config, name: str, task: Task) -> None:
    one = config.eval.resolved_sets[name]
    if one.num_prompts > task.num_eval:
        stated = config.eval.sets.get(name, EvalSetConfig()).num_prompts
        setting = f"eval.sets.{name}.num_prompts" if stated or one.task else "eval.num_prompts"
        raise ConfigError(f"{setting}={one.num_prompts}: the task holds out {task.num_eval} (task.num_eval)")


def _key_of(one: EvalSetConfig) -> str:
    """Returns a key that is equal for sets with the same task; empty for the job's task."""
    return canonical_json(one.task) if one.task else ""


def _make(config: Config, name: str, one: EvalSetConfig) -> Task:
    try:
        task = make_task(one.task, seed=config.seed, sandbox=config.rewards.sandbox)
        task.check()
        task.fingerprint()  # checks that its first examples can be made
    except ConfigError as error:
        raise ConfigError(f"eval.sets.{name}: {error}") from error
    return task


@contextlib.asynccontextmanager
async def running_sources(
    config: Config,
    tasks: Mapping[str, Task],
    renderer: PromptRenderer,
    *,
    contexts: Mapping[str, int],
    waits: PendingWaits,
) -> AsyncIterator[dict[str, SampleSource]]:
    """Yields the sources by name, with running worker processes. `contexts`: longest sequences, in tokens.

    Raises ConfigError if a task cannot be imported, if the environment of its first example cannot be created
    or rendered or does not fit into the context, and for contradictory settings.
    """
    check_reward_concurrency(config, tasks)
    sets = config.eval.resolved_sets
    workers: dict[str, tuple[RewardPool, EnvironmentPool | None, First | None]] = {}
    sources: dict[str, SampleSource] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, task in tasks.items():
            one = sets[name] if name else None
            key = _key_of(one) if one is not None else ""
            if key not in workers:
                if task.has_environment or task.uses_sessions:
                    _check_limits(config, task)
                    renderer.chat  # noqa: B018, raises ConfigError if the model has no chat format
                of_task = dataclasses.replace(config, task=one.task) if one is not None and key else config
                workers[key] = await stack.enter_async_context(_running_workers(of_task, task, waits=waits))
            rewards, environments, first = workers[key]
            if first is not None:
                _check_first(renderer, first, context_tokens=contexts[name])
            limited = renderer
            if one is not None:
                max_new_tokens = one.max_new_tokens or config.sampling.max_new_tokens
                limited = renderer.limited(min(task.max_prompt_tokens, contexts[name] - max_new_tokens))
            sources[name] = SampleSource(
                task=task,
                renderer=limited,
                context_tokens=contexts[name],
                rewards=rewards,
                environments=environments,
                settings=one,
            )
        yield sources


def check_reward_concurrency(config: Config, tasks: Mapping[str, Task]) -> None:
    """Raises ConfigError for a `rollout.reward_concurrency` that would have no effect."""
    concurrency = config.rollout.reward_concurrency
    if concurrency > 1 and tasks[""].has_reward and not any(task.has_async_reward for task in tasks.values()):
        raise ConfigError(
            f"rollout.reward_concurrency={concurrency} needs a task with `async def reward`: set it to 1, "
            "and raise rollout.reward_workers for more rewards at a time"
        )


@contextlib.asynccontextmanager
async def _running_workers(
    config: Config, task: Task, *, waits: PendingWaits
) -> AsyncIterator[tuple[RewardPool, EnvironmentPool | None, First | None]]:
    """Yields the worker processes of one task, and the first environment's messages and tools."""
    has_agents = task.has_agent and not task.external
    host = WorkerHost.of(config, task)
    async with contextlib.AsyncExitStack() as stack:
        if task.has_reward or task.has_environment or has_agents:
            await stack.enter_async_context(host)
        rewards = await stack.enter_async_context(RewardPool.of(config, task, host))
        waits.sources.append(rewards.waits)
        environments, first = None, None
        if task.has_environment or has_agents:
            environments = EnvironmentPool(
                host, step_timeout_s=config.episode.step_timeout_s, memory_mb=config.episode.memory_mb
            )
            waits.sources.append(environments.slow_starts)
            if task.has_environment:
                waits.sources.append(environments.slow_calls)
            with waits("environments: start" if task.has_environment else "agents: start"):
                await stack.enter_async_context(environments)
                if task.has_environment:
                    first = await environments.check()
        yield rewards, environments, first


def _check_first(renderer: PromptRenderer, first: First, *, context_tokens: int) -> None:
    """Raises ConfigError unless the first environment's messages and tools can be rendered and fit into the
    context."""
    chat, (messages, tools) = renderer.chat, first
    if tools and not chat.supports_tools:
        raise ConfigError(
            "the task's environments have tools, and the model's chat template does not render them: "
            "use a model with a chat template for tools, or set model.renderer"
        )
    try:
        num_tokens = len(chat.render(messages, tools=tools))
    except EpisodeError as error:
        raise ConfigError(f"the messages of the first environment cannot be rendered: {error}") from error
    if num_tokens >= context_tokens:
        advice = (
            "raise rollout.max_context, or without it the smallest of task.max_prompt_tokens, "
            "episode.max_tokens and trainer.tokens_per_microbatch"
        )
        if context_tokens >= renderer.max_positions:
            advice = "that is the model's limit, so use another model (model.path)"
        raise ConfigError(
            f"the messages of the first environment have {num_tokens} tokens, and a sequence at most "
            f"{context_tokens}: {advice}"
        )


def _check_limits(config: Config, task: Task) -> None:
    """Raises ConfigError if the trainer would report a stall while a sample is within its limits."""
    if task.has_environment:
        setting, who, limit_s = "episode.step_timeout_s", "an environment", config.episode.step_timeout_s
    else:
        setting, who, limit_s = "sessions.idle_timeout_s", "an agent", config.sessions.idle_timeout_s
    for key, stall_s in (
        ("trainer.fetch_timeout_s", config.trainer.fetch_timeout_s),
        ("eval.timeout_s", config.eval.timeout_s),
    ):
        if limit_s >= config.stall_s(stall_s):
            raise ConfigError(
                f"{key}={stall_s:g} after rollout.generate_timeout_s={config.rollout.generate_timeout_s:g} "
                f"is not above {setting}={limit_s:g}: the trainer would report a stall while {who} is within "
                "its limit"
            )
