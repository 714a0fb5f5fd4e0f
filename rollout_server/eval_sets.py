"""The evaluation sets that a rollout server serves: their tasks, limits, and worker processes.

Sets without a task of their own use the job's task with its processes. Each other task has its own reward
processes, and its own environments if it has any: so a reward of an evaluation that hangs keeps no training
sample waiting, and `rollout.reward_concurrency` applies where the task's reward is asynchronous.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass

from areal_like.config import Config, EvalSetConfig
from areal_like.runtime.waits import PendingWaits
from rollout_server.context_length import longest_evaluation
from rollout_server.job_tasks import key_of
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.sample.environments import Environments, running_environments
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.maker import Sessions, running_sessions
from rollout_server.tasks.base import Task
from rollout_server.workers.reward_pool import RewardPool


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set: its settings, and what its samples need."""

    settings: EvalSetConfig
    task: Task
    renderer: PromptRenderer
    """With the set's limit of a prompt's tokens."""
    rewards: RewardPool
    environments: Environments | None
    sessions: Sessions | None = None


def job_rewards(config: Config, task: Task, tasks_of_sets: Iterable[Task]) -> RewardPool:
    """The reward processes of the job's task. Raises ConfigError as `RewardPool.of`.

    `rollout.reward_concurrency` may be meant for the rewards of an evaluation set alone.
    """
    is_for_a_set = any(other.has_async_reward for other in tasks_of_sets)
    return RewardPool.of(
        _one_at_a_time(config) if is_for_a_set and not task.has_async_reward else config, task
    )


def eval_contexts(
    config: Config, tasks: Mapping[str, Task], *, of_training: int, max_positions: int
) -> dict[str, int]:
    """Longest sequence of each set, in tokens. `of_training`: that of the job's training samples."""
    sets = config.eval.resolved_sets
    return {
        name: longest_evaluation(config, sets[name], task, max_positions=max_positions)
        if sets[name].task or sets[name].max_new_tokens
        else of_training
        for name, task in tasks.items()
    }


@contextlib.asynccontextmanager
async def running_eval_sets(
    config: Config,
    tasks: Mapping[str, Task],
    renderer: PromptRenderer,
    *,
    contexts: Mapping[str, int],
    waits: PendingWaits,
    rewards: RewardPool,
    environments: Environments | None,
    sessions: Sessions | None,
    book: SessionBook,
) -> AsyncIterator[dict[str, EvalSet]]:
    """The sets, with running worker processes. `rewards`, `environments`, `sessions`: of the job's
    task."""
    sets = config.eval.resolved_sets
    pools: dict[str, RewardPool] = {"": rewards}
    served: dict[str, EvalSet] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, task in tasks.items():
            one, key = sets[name], key_of(sets[name])
            of_set = _config_of(config, one, task)
            if key not in pools:
                pools[key] = await stack.enter_async_context(RewardPool.of(of_set, task))
            own, own_sessions = environments, sessions
            has_turns = task.has_environment or task.uses_sessions
            if key or (has_turns and one.max_new_tokens):  # a conversation knows its context
                context_tokens = contexts[name]
                own = await stack.enter_async_context(
                    running_environments(of_set, task, renderer, context_tokens=context_tokens, waits=waits)
                )
                own_sessions = await stack.enter_async_context(
                    running_sessions(
                        of_set, task, renderer, context_tokens=context_tokens, waits=waits, book=book
                    )
                )
            max_new_tokens = one.max_new_tokens or config.sampling.max_new_tokens
            served[name] = EvalSet(
                settings=one,
                task=task,
                renderer=renderer.limited(min(task.max_prompt_tokens, contexts[name] - max_new_tokens)),
                rewards=pools[key],
                environments=own,
                sessions=own_sessions,
            )
        yield served


def _config_of(config: Config, one: EvalSetConfig, task: Task) -> Config:
    """The job's configuration with the set's task; one reward at a time if its reward is synchronous."""
    if not one.task:
        return config
    of_set = dataclasses.replace(config, task=one.task)
    return of_set if task.has_async_reward else _one_at_a_time(of_set)


def _one_at_a_time(config: Config) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, reward_concurrency=1))
