"""The tasks of a rollout server: the one it trains on, and those of the evaluation sets.

They are made first, because that finds most mistakes in a configuration, and before the slow imports. Prompts
that are too long are left out when the tokenizer is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from areal_like.config import Config, EvalSetConfig
from areal_like.errors import ConfigError
from areal_like.wire.fingerprint import canonical_json
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Task, make_task


def make_tasks(config: Config) -> tuple[Task, dict[str, Task]]:
    """The task to train on, and that of each evaluation set; sets with equal settings share one.

    Raises ConfigError for a task that cannot be made, has no training prompts, or holds out too few.
    """
    task = make_task(config.task, seed=config.seed, sandbox=config.rewards.sandbox)
    task.check()
    if not task.num_train:
        raise ConfigError("task.train is not set: name the rows to train on")
    return task, eval_tasks(config, task)


def eval_tasks(config: Config, task: Task) -> dict[str, Task]:
    """The task of each set. `task`: the job's. Raises ConfigError."""
    made: dict[str, Task] = {}
    tasks: dict[str, Task] = {}
    for name, one in config.eval.resolved_sets.items():
        key = key_of(one)
        if key and key not in made:
            made[key] = _make(config, name, one)
        tasks[name] = made.get(key, task)
        _check_num_prompts(config, name, tasks[name])
    return tasks


def without_long_prompts(
    config: Config,
    task: Task,
    tasks: Mapping[str, Task],
    renderer: PromptRenderer,
    *,
    contexts: Mapping[str, int],
) -> tuple[Task, dict[str, Task]]:
    """The tasks without the prompts that are too long, for training or for one of the sets of a task.

    Raises ConfigError if too few are left.
    """
    task = task.without_long_prompts(renderer)
    sets = config.eval.resolved_sets
    limits: dict[str, int] = {}
    for name, one in sets.items():
        limit = contexts[name] - (one.max_new_tokens or config.sampling.max_new_tokens)
        limits[key_of(one)] = min(limit, limits.get(key_of(one), limit))
    fitted = {"": task}
    for name, one in sets.items():
        key = key_of(one)
        if key not in fitted:
            fitted[key] = tasks[name].without_long_prompts(renderer.limited(limits[key]))
        _check_num_prompts(config, name, fitted[key])
    return task, {name: fitted[key_of(one)] for name, one in sets.items()}


def content_of(tasks: Mapping[str, Task]) -> str:
    """16 hex digits over the examples and data of all sets; empty without sets."""
    prints = {name: task.fingerprint() for name, task in tasks.items()}
    return hashlib.sha256(canonical_json(prints).encode()).hexdigest()[:16] if prints else ""


def _check_num_prompts(config: Config, name: str, task: Task) -> None:
    one = config.eval.resolved_sets[name]
    if one.num_prompts > task.num_eval:
        stated = config.eval.sets.get(name, EvalSetConfig()).num_prompts
        setting = f"eval.sets.{name}.num_prompts" if stated or one.task else "eval.num_prompts"
        raise ConfigError(f"{setting}={one.num_prompts}: the task holds out {task.num_eval} (task.num_eval)")


def key_of(one: EvalSetConfig) -> str:
    """Equal for sets with the same task; empty for the job's."""
    return canonical_json(one.task) if one.task else ""


def _make(config: Config, name: str, one: EvalSetConfig) -> Task:
    try:
        task = make_task(one.task, seed=config.seed, sandbox=config.rewards.sandbox)
        task.check()
        task.fingerprint()  # its first examples can be made
    except ConfigError as error:
        raise ConfigError(f"eval.sets.{name}: {error}") from error
    return task
