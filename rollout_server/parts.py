"""What a rollout server needs to make samples: its tasks, their worker processes and sessions, the engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from areal_like.automatic_settings import compute_dtype
from areal_like.paths import model_path
from areal_like.runtime.daemon import Runtime
from areal_like.runtime.imports import torch_hidden, uncollected
from areal_like.security.binding import require_loopback_or_keys
from areal_like.wire.addresses import buffer_addresses
from rollout_server.context_length import longest_sequence
from rollout_server.eval_sets import EvalSet, eval_contexts, job_rewards, running_eval_sets
from rollout_server.job_tasks import make_tasks, without_long_prompts
from rollout_server.policy.engines.engine import Engine, make_engine
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.sample.environments import Environments, running_environments
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.plane import SessionPlane
from rollout_server.sessions.maker import Sessions, running_sessions
from rollout_server.sessions.serving import served_sessions
from rollout_server.tasks.base import Task
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.reward_pool import RewardPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts, running. The engine is started by its supervisor."""

    task: Task
    renderer: PromptRenderer
    model: str
    rewards: RewardPool
    environments: Environments | None
    sessions: Sessions | None
    eval_sets: Mapping[str, EvalSet]
    book: SessionBook
    """Of the sessions of all tasks."""
    plane: SessionPlane | None
    """Where they are served; None if no task has sessions."""
    engine: Engine

    @property
    def reward_pools(self) -> list[RewardPool]:
        """Those of the job's task and of the evaluation sets."""
        return list(dict.fromkeys([self.rewards, *(one.rewards for one in self.eval_sets.values())]))

    @property
    def environment_pools(self) -> list[EnvironmentPool]:
        """Processes of environments and agents, of the job's task and of the evaluation sets."""
        used = [self.environments, self.sessions]
        for one in self.eval_sets.values():
            used += [one.environments, one.sessions]
        return list(dict.fromkeys(one.pool for one in used if one is not None and one.pool is not None))


@contextlib.asynccontextmanager
async def running_parts(runtime: Runtime) -> AsyncIterator[Parts]:
    """Makes the parts, and starts their processes. Raises ConfigError for settings that contradict others."""
    config, waits = runtime.config, runtime.waits
    task, tasks_of_sets = make_tasks(config)
    require_loopback_or_keys(config.security, config.rollout.host, setting="rollout.host")
    buffer_addresses(config)  # raises before the slow imports if the buffer's port is not set
    model = model_path(config)
    with torch_hidden(), uncollected():
        renderer = PromptRenderer(model, settings=config.model)
    context_tokens = longest_sequence(config, task, max_positions=renderer.max_positions)
    contexts = eval_contexts(
        config, tasks_of_sets, of_training=context_tokens, max_positions=renderer.max_positions
    )
    renderer.max_prompt_tokens = min(task.max_prompt_tokens, context_tokens - config.sampling.max_new_tokens)
    task, tasks_of_sets = without_long_prompts(config, task, tasks_of_sets, renderer, contexts=contexts)
    log.info("task %s, examples %s, %s", config.task, task.fingerprint(), compute_dtype(config))
    pool = job_rewards(config, task, tasks_of_sets.values())
    engine = make_engine(
        config,
        name=runtime.name,
        model=model,
        context_tokens=max([context_tokens, *contexts.values()]),
        max_positions=renderer.max_positions,
        vocab_size=renderer.vocab_size,
    )
    book = SessionBook()
    async with (
        running_environments(
            config, task, renderer, context_tokens=context_tokens, waits=waits
        ) as environments,
        running_sessions(
            config, task, renderer, context_tokens=context_tokens, waits=waits, book=book
        ) as sessions,
        pool as rewards,
        running_eval_sets(
            config,
            tasks_of_sets,
            renderer,
            contexts=contexts,
            waits=waits,
            rewards=rewards,
            environments=environments,
            sessions=sessions,
            book=book,
        ) as eval_sets,
        served_sessions(
            runtime,
            book,
            tasks=[task, *tasks_of_sets.values()],
            model=model,
            context_tokens=max([context_tokens, *contexts.values()]),
        ) as plane,
    ):
        yield Parts(
            task=task,
            renderer=renderer,
            model=model,
            rewards=rewards,
            environments=environments,
            sessions=sessions,
            eval_sets=eval_sets,
            book=book,
            plane=plane,
            engine=engine,
        )
