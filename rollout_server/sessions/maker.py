"""The sessions of one task: its agents' processes, and the attempts of its samples."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.runtime.waits import PendingWaits
from areal_like.wire.messages.producer import Lease
from rollout_server.conversation.conversation import Conversation
from rollout_server.rendering.base import ChatRenderer
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.sample.attempt import SampleRequest, SessionMaker
from rollout_server.sessions.attempt import SessionAttempt
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Example, Score, Task
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.reward_pool import RewardPool


class Sessions(SessionMaker):
    """Begins the attempts. Belongs to one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        book: SessionBook,
        chat: ChatRenderer,
        context_tokens: int,
        pool: EnvironmentPool | None,
    ) -> None:
        """`pool`: of the processes of `agent()`; None if external agents make the samples."""
        self.pool = pool
        self._book = book
        self._chat = chat
        self._context_tokens = context_tokens
        self._max_tokens = config.episode.max_tokens or context_tokens
        self._max_turns = config.episode.max_turns
        self._idle_timeout_s = config.sessions.idle_timeout_s
        self._heartbeat_limit_s = config.sessions.heartbeat_limit_s

    def begin(
        self,
        request: SampleRequest,
        lease: Lease,
        sample_index: int,
        *,
        example: Example,
        rewards: RewardPool | None,
    ) -> SessionAttempt:
        """As SessionMaker.begin."""
        is_external = self.pool is None
        session = OpenSession(
            id=self._new_id(f"{lease.ticket_id}-{sample_index}-{lease.lease_id}"),
            api_key=secrets.token_urlsafe(32),
            conversation=Conversation(
                self._chat,
                request.policy,
                context_tokens=self._context_tokens,
                max_tokens=self._max_tokens,
            ),
            max_turns=self._max_turns,
            group=lease.ticket_id,
            sample=sample_index,
            split=request.split,
            index=request.index,
            on_move=request.on_move,
            example=example if is_external else None,
            is_waiting=is_external,
            needs_reward=is_external and rewards is None,
            heartbeat_limit_s=self._heartbeat_limit_s,
        )
        return SessionAttempt(
            request,
            session=session,
            book=self._book,
            rewards=rewards,
            idle_timeout_s=self._idle_timeout_s,
            run_agent=None if is_external else self._run_agent,
            label=example.label,
        )

    def _new_id(self, place: str) -> str:
        """With the attempt in it, so that a client of an earlier one does not reach this one: the lease, and
        a number if an agent has abandoned the lease's sample."""
        number, id = 1, place
        while self._book.key_of(id):
            number += 1
            id = f"{place}-{number}"
        return id

    async def _run_agent(self, session: OpenSession, request: SampleRequest) -> Score | None:
        assert self.pool is not None
        process = await self.pool.open(split=request.split, index=request.index, seed=request.seed)
        try:
            return await process.run_agent(f"{self._book.url}/sessions/{session.id}/v1", session.api_key)
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def running_sessions(
    config: Config,
    task: Task,
    renderer: PromptRenderer,
    *,
    context_tokens: int,
    waits: PendingWaits,
    book: SessionBook,
) -> AsyncIterator[Sessions | None]:
    """The sessions; None if the task's samples are none.

    Raises ConfigError if the task cannot be imported by the processes of its agents, if the model has no chat
    format, and for time limits that contradict each other.
    """
    if not task.uses_sessions:
        yield None
        return
    _check_limits(config)
    chat = renderer.chat
    async with contextlib.AsyncExitStack() as stack:
        pool = None
        if not task.external:
            pool = EnvironmentPool(
                task.settings_of_workers(config.task),
                seed=config.seed,
                sandbox=config.rewards.sandbox,
                step_timeout_s=config.episode.step_timeout_s,
                memory_mb=config.episode.memory_mb,
            )
            waits.sources.append(pool.slow_starts)
            with waits("agents: start"):
                await stack.enter_async_context(pool)
        yield Sessions(config, book=book, chat=chat, context_tokens=context_tokens, pool=pool)


def _check_limits(config: Config) -> None:
    idle_s = config.sessions.idle_timeout_s
    for key, limit_s in (
        ("trainer.fetch_timeout_s", config.trainer.fetch_timeout_s),
        ("eval.timeout_s", config.eval.timeout_s),
    ):
        if idle_s >= config.stall_s(limit_s):
            raise ConfigError(
                f"{key}={limit_s:g} after rollout.generate_timeout_s={config.rollout.generate_timeout_s:g} "
                f"is not above sessions.idle_timeout_s={idle_s:g}: the trainer would report a stall while an "
                "agent is within its limit"
            )
