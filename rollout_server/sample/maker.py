"""Begins the attempts at the samples of one source: sampling parameters, seeds, limits, and the kind."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from areal_like.config import Config
from areal_like.errors import EngineError
from areal_like.wire.messages.producer import Lease
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import Turns
from rollout_server.leases.held_leases import Place
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.attempt import (
    Attempt,
    EnvironmentAttempt,
    SampleRequest,
    SessionAttempt,
    SingleTurn,
)
from rollout_server.sample.prompts import SPLITS, LoadedPrompt, PromptLeader
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.journal import JournalStore, SessionJournal, read_journal
from rollout_server.sessions.open_session import OpenSession, restore_session
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Example, Score
from rollout_server.teachers.pool import TeacherPool

_LONGEST_START_S = 10.0
"""After this long without a request the next agent starts: some prepare for minutes, mostly waiting."""
_MAX_SEED = 1 << 31


def sampling_of(
    config: Config, source: SampleSource, lease: Lease, sample_index: int, *, example: Example | None
) -> Sampling:
    """Returns the sampling parameters of one sample. `example`: None if an environment makes the prompt.

    config.sampling            length, temperature and stop texts, with the model's stop tokens
    eval.sets.NAME             of an evaluation: its own length, temperature and filters
    lease                      the seed; temperature 0 for a greedy baseline
    example.max_new_tokens     the length, if it is shorter
    """
    job, one = config.sampling, source.settings
    sampling = Sampling(
        max_new_tokens=job.max_new_tokens,
        temperature=job.temperature,
        stop_token_ids=tuple(source.renderer.stop_token_ids),
        stop=job.stop,
        sampling_seed=_seed_of(lease, sample_index),
    )
    if one is not None:
        sampling = replace(
            sampling,
            max_new_tokens=one.max_new_tokens or job.max_new_tokens,
            temperature=one.temperature,
            top_p=one.top_p,
            top_k=one.top_k or -1,
            min_p=one.min_p,
        )
    if sampling.temperature == 0 or sample_index in lease.greedy_indices:
        sampling = replace(sampling, temperature=0.0, sampling_seed=None)
    if config.model.router_replay and one is None and sampling.temperature > 0:
        sampling = replace(sampling, returns_routes=True)  # the sample is trained on
    if example is not None and 0 < example.max_new_tokens < sampling.max_new_tokens:
        sampling = replace(sampling, max_new_tokens=example.max_new_tokens)
    return sampling


@dataclass(frozen=True, kw_only=True)
class AttemptMaker:
    """Begins attempts at the samples of one source."""

    config: Config
    source: SampleSource
    gate: GenerationGate
    on_move: Callable[[int, int, Place], None]
    """Called with (lease id, sample index, place) when a sample leaves the engine or comes back."""
    book: SessionBook
    """The sessions offered to agents."""
    journals: JournalStore | None = None
    """Keeps the journals of sessions; None: sessions end with their server."""
    teachers: TeacherPool | None = None
    """Teachers at servers, for training samples; None: there are none."""

    def begin(
        self,
        engine: EngineClient | None,
        lease: Lease,
        sample_index: int,
        *,
        prompt: LoadedPrompt | None,
        leader: PromptLeader,
        recorded: tuple[str, list[bytes]] | None = None,
    ) -> Attempt:
        """Begins an attempt. `prompt`: None if an environment provides it. `recorded`: id and journal of the
        session to continue. Raises EngineError without an engine, UnusableJournalError."""
        if engine is None:
            raise EngineError("there is no engine")
        source, task = self.source, self.source.task
        example = None if prompt is None else prompt.example
        sampling = sampling_of(self.config, source, lease, sample_index, example=example)
        policy = PolicyClient(
            engine,
            sampling=sampling,
            rid=f"{lease.lease_id}.{sample_index}",
            gate=self.gate,
            timeout_s=self.config.rollout.sample_timeout_s or math.inf,
            on_first_token=leader.prompt_computed,
        )
        is_rewarded = task.has_reward if example is None else task.is_rewarded(example)
        request = SampleRequest(
            split=SPLITS[lease.purpose],
            index=lease.prompt_index,
            seed=_seed_of(lease, sample_index),
            is_greedy=sampling.temperature == 0,
            policy=policy,
            on_move=partial(self.on_move, lease.lease_id, sample_index),
            rewards=source.rewards if is_rewarded else None,
            teachers=None if source.settings is not None or sampling.temperature == 0 else self.teachers,
        )
        if prompt is not None and task.uses_sessions:
            return self._begin_session(
                request, lease, sample_index, example=prompt.example, recorded=recorded
            )
        if prompt is not None:
            return SingleTurn(
                request=request,
                turns=Turns(policy),
                label=prompt.example.label,
                prompt=prompt,
                leader=leader,
                renderer=source.renderer,
            )
        assert source.environments is not None
        return EnvironmentAttempt(
            request=request,
            turns=self._conversation(policy),
            environments=source.environments,
            max_turns=self.config.episode.max_turns,
        )

    def _conversation(self, policy: PolicyClient) -> Conversation:
        context_tokens = self.source.context_tokens
        return Conversation(
            self.source.renderer.chat,
            policy,
            context_tokens=context_tokens,
            max_tokens=self.config.episode.max_tokens or context_tokens,
        )

    def _begin_session(
        self,
        request: SampleRequest,
        lease: Lease,
        sample_index: int,
        *,
        example: Example,
        recorded: tuple[str, list[bytes]] | None,
    ) -> SessionAttempt:
        is_external = self.source.environments is None
        sessions, keys = self.config.sessions, self.book.keys
        conversation = self._conversation(request.policy)
        read = None if recorded is None else read_journal(*recorded, conversation=conversation)
        place = f"{lease.ticket_id}-{sample_index}-{lease.lease_id}"
        id = self._new_id(place) if read is None else read.session
        journal = None
        if is_external and self.journals is not None and sessions.journal_bytes:
            journal = SessionJournal(
                self.journals,
                lease_id=lease.lease_id,
                ticket_id=lease.ticket_id,
                sample_index=sample_index,
                session=id,
                # An entry is one message.
                max_bytes=min(sessions.journal_bytes, self.config.buffer.max_message_bytes // 2),
                counts=self.book.journals,
            )
        session = OpenSession(
            id=id,
            api_key=keys.new_key(id) if read is None else keys.key_of(id, str(read.claim["nonce"])),
            conversation=conversation,
            max_turns=self.config.episode.max_turns,
            group=lease.ticket_id,
            sample=sample_index,
            split=request.split,
            index=request.index,
            on_move=request.on_move,
            example=example if is_external else None,
            is_waiting=is_external,
            needs_reward=is_external and request.rewards is None,
            heartbeat_limit_s=sessions.heartbeat_limit_s,
            journal=journal,
        )
        if read is not None:
            restore_session(session, read)
        return SessionAttempt(
            request=request,
            turns=session.conversation,
            session=session,
            book=self.book,
            idle_timeout_s=sessions.idle_timeout_s,
            run_agent=None if is_external else self._run_agent,
            label=example.label,
        )

    def _new_id(self, place: str) -> str:
        """Returns an id that is unique to the attempt, so that a client of an earlier attempt cannot reach
        this one: the lease, and a number if an agent abandoned the lease's sample."""
        number, id = 1, place
        while self.book.key_of(id):
            number += 1
            id = f"{place}-{number}"
        return id

    async def _run_agent(self, session: OpenSession, request: SampleRequest) -> Score | None:
        assert self.source.environments is not None
        starts = self.book.agent_starts
        session.wait_for_agent()
        with contextlib.ExitStack() as turn:
            await starts.acquire()
            turn.callback(starts.release)
            process = await self.source.environments.open(
                split=request.split, index=request.index, seed=request.seed
            )
            session.agent_starts(on_call=turn.close)
            timer = asyncio.get_running_loop().call_later(_LONGEST_START_S, turn.close)
            try:
                return await process.run_agent(f"{self.book.url}/sessions/{session.id}/v1", session.api_key)
            finally:
                timer.cancel()
                process.kill()


def _seed_of(lease: Lease, sample_index: int) -> int:
    return (lease.seed + sample_index) % _MAX_SEED
