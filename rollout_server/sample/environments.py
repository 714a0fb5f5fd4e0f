"""Starts the environments of a server's task, and checks the first one before the engine starts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from areal_like.config import Config
from areal_like.errors import ConfigError, EpisodeError
from areal_like.runtime.waits import PendingWaits
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Task
from rollout_server.workers.environment_pool import EnvironmentPool


@dataclass(frozen=True, kw_only=True)
class Environments:
    """What the samples of a task with environments need."""

    pool: EnvironmentPool
    begin_conversation: Callable[[PolicyClient], Conversation]


@contextlib.asynccontextmanager
async def running_environments(
    config: Config, task: Task, renderer: PromptRenderer, *, context_tokens: int, waits: PendingWaits
) -> AsyncIterator[Environments | None]:
    """The environments; None if the task has none.

    Raises ConfigError if the environment of the first example cannot be made, if its messages cannot be
    rendered or do not fit into the context, and for time limits that contradict each other.
    """
    if not task.has_environment:
        yield None
        return
    _check_limits(config)
    chat = renderer.chat
    episode = config.episode
    pool = EnvironmentPool(
        task.settings_of_workers(config.task),
        seed=config.seed,
        sandbox=config.rewards.sandbox,
        step_timeout_s=episode.step_timeout_s,
        memory_mb=episode.memory_mb,
    )
    waits.sources += [pool.slow_starts, pool.slow_calls]
    async with contextlib.AsyncExitStack() as stack:
        with waits("environments: start"):
            await stack.enter_async_context(pool)
            messages, tools = await pool.check()
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
            raise ConfigError(
                f"the messages of the first environment have {num_tokens} tokens, and a sequence at most "
                f"{context_tokens}: raise rollout.max_context, or without it the smallest of "
                "task.max_prompt_tokens, episode.max_tokens and trainer.tokens_per_microbatch"
            )
        yield Environments(
            pool=pool,
            begin_conversation=lambda policy: Conversation(
                chat,
                policy,
                context_tokens=context_tokens,
                max_tokens=episode.max_tokens or context_tokens,
            ),
        )


def _check_limits(config: Config) -> None:
    step_s = config.episode.step_timeout_s
    for key, limit_s in (
        ("trainer.fetch_timeout_s", config.trainer.fetch_timeout_s),
        ("eval.timeout_s", config.eval.timeout_s),
    ):
        if step_s >= config.stall_s(limit_s):
            raise ConfigError(
                f"{key}={limit_s:g} after rollout.generate_timeout_s={config.rollout.generate_timeout_s:g} "
                f"is not above episode.step_timeout_s={step_s:g}: the trainer would report a stall while an "
                "environment is within its limit"
            )
