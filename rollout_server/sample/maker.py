"""Creates attempts for the samples of one source, with their sampling parameters, seeds, limits and kind."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from areal_like.config import Config
from areal_like.errors import EngineError
from areal_like.wire.messages.producer import Lease
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.leases.held_leases import Place
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.types import Sampling
from rollout_server.sample.attempt import Attempt, SampleRequest, SingleTurn
from rollout_server.sample.environment_attempt import EnvironmentAttempt
from rollout_server.sample.prompts import SPLITS, LoadedPrompt, PromptLeader
from rollout_server.sample.session_attempt import SessionAttempt
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.open_session import OpenSession
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Score

_MAX_SEED = 1 << 31


class AttemptMaker:
    """Creates an attempt for each sample."""

    def __init__(
        self,
        config: Config,
        source: SampleSource,
        *,
        gate: GenerationGate,
        on_move: Callable[[int, int, Place], None],
        book: SessionBook,
    ) -> None:
        """`on_move`, `book`: see LeaseRunner."""
        self._source = source
        self._gate = gate
        self._on_move = on_move
        self._book = book
        self._sessions = config.sessions
        self._sampling = Sampling(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=tuple(source.renderer.stop_token_ids),
            stop=config.sampling.stop,
        )
        if (one := source.settings) is not None:
            self._sampling = replace(
                self._sampling,
                max_new_tokens=one.max_new_tokens or config.sampling.max_new_tokens,
                temperature=one.temperature,
                top_p=one.top_p,
                top_k=one.top_k or -1,
                min_p=one.min_p,
            )
        self._sample_timeout_s = config.rollout.sample_timeout_s or math.inf
        self._max_turns = config.episode.max_turns
        self._max_tokens = config.episode.max_tokens or source.context_tokens

    def begin(
        self,
        engine: EngineClient | None,
        lease: Lease,
        sample_index: int,
        *,
        prompt: LoadedPrompt | None,
        leader: PromptLeader,
    ) -> Attempt:
        """Creates an attempt. `prompt`: None if an environment provides it. Raises EngineError without an
        engine."""
        if engine is None:
            raise EngineError("there is no engine")
        source = self._source
        is_greedy = self._sampling.temperature == 0 or sample_index in lease.greedy_indices
        seed = (lease.seed + sample_index) % _MAX_SEED
        sampling = replace(
            self._sampling,
            temperature=0.0 if is_greedy else self._sampling.temperature,
            sampling_seed=None if is_greedy else seed,
        )
        if prompt is not None and 0 < prompt.example.max_new_tokens < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=prompt.example.max_new_tokens)
        policy = PolicyClient(
            engine.episode(on_first_token=leader.prompt_computed),
            sampling=sampling,
            rid=f"{lease.lease_id}.{sample_index}",
            gate=self._gate,
            timeout_s=self._sample_timeout_s,
        )
        is_rewarded = source.task.has_reward if prompt is None else source.task.is_rewarded(prompt.example)
        request = SampleRequest(
            split=SPLITS[lease.purpose],
            index=lease.prompt_index,
            seed=seed,
            is_greedy=is_greedy,
            policy=policy,
            on_move=partial(self._on_move, lease.lease_id, sample_index),
            rewards=source.rewards if is_rewarded else None,
        )
        if prompt is not None and source.task.uses_sessions:
            return self._begin_session(request, lease, sample_index, prompt=prompt)
        if prompt is not None:
            return SingleTurn(request, prompt=prompt, leader=leader, renderer=source.renderer)
        assert source.environments is not None
        return EnvironmentAttempt(
            request,
            conversation=self._conversation(policy),
            environments=source.environments,
            max_turns=self._max_turns,
        )

    def _conversation(self, policy: PolicyClient) -> Conversation:
        source = self._source
        return Conversation(
            source.renderer.chat, policy, context_tokens=source.context_tokens, max_tokens=self._max_tokens
        )

    def _begin_session(
        self, request: SampleRequest, lease: Lease, sample_index: int, *, prompt: LoadedPrompt
    ) -> SessionAttempt:
        is_external = self._source.environments is None
        session = OpenSession(
            id=self._new_id(f"{lease.ticket_id}-{sample_index}-{lease.lease_id}"),
            api_key=secrets.token_urlsafe(32),
            conversation=self._conversation(request.policy),
            max_turns=self._max_turns,
            group=lease.ticket_id,
            sample=sample_index,
            split=request.split,
            index=request.index,
            on_move=request.on_move,
            example=prompt.example if is_external else None,
            is_waiting=is_external,
            needs_reward=is_external and request.rewards is None,
            heartbeat_limit_s=self._sessions.heartbeat_limit_s,
        )
        return SessionAttempt(
            request,
            session=session,
            book=self._book,
            idle_timeout_s=self._sessions.idle_timeout_s,
            run_agent=None if is_external else self._run_agent,
            label=prompt.example.label,
        )

    def _new_id(self, place: str) -> str:
        """Returns an id that is unique to the attempt, so that a client of an earlier attempt cannot reach
        this one: the lease, and a number if an agent abandoned the lease's sample."""
        number, id = 1, place
        while self._book.key_of(id):
            number += 1
            id = f"{place}-{number}"
        return id

    async def _run_agent(self, session: OpenSession, request: SampleRequest) -> Score | None:
        assert self._source.environments is not None
        process = await self._source.environments.open(
            split=request.split, index=request.index, seed=request.seed
        )
        try:
            return await process.run_agent(f"{self._book.url}/sessions/{session.id}/v1", session.api_key)
        finally:
            process.kill()
