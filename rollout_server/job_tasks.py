"""The tasks of a rollout server, by name of the evaluation set; the empty name is the training task.

They are created first, before the slow imports, because that finds most mistakes in a configuration. Prompts
that are too long are left out once the tokenizer is available.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from areal_like.config import Config, EvalSetConfig
from areal_like.errors import ConfigError
from areal_like.wire.fingerprint import canonical_json
from rollout_server.context_length import longest_evaluation, longest_sequence
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Task, make_task


def make_tasks(config: Config) -> dict[str, Task]:
    """Returns the training task (empty name) and the task of each evaluation set; sets with equal settings
    share one.

    Raises ConfigError for a task that cannot be made, has no training prompts, or holds out too few.
    """
    task = make_task(config.task, seed=config.seed, sandbox=config.rewards.sandbox)
    task.check()
    if not task.num_train:
        raise ConfigError("task.train is not set: name the rows to train on")
    made = {"": task}
    tasks = {"": task}
    for name, one in config.eval.resolved_sets.items():
        key = key_of(one)
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
        limits[key_of(one)] = min(limit, limits.get(key_of(one), limit))
    fitted = {"": tasks[""].without_long_prompts(renderer)}
    for name, one in sets.items():
        key = key_of(one)
        if key not in fitted:
            fitted[key] = tasks[name].without_long_prompts(renderer.limited(limits[key]))
        _check_num_prompts(config, name, fitted[key])
    return {"": fitted[""]} | {name: fitted[key_of(one)] for name, one in sets.items()}


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


def key_of(one: EvalSetConfig) -> str:
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
