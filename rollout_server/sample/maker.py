"""Begins the attempts to make the samples of leases: sampling parameters, seeds, limits, kind of episode."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from areal_like.config import Config, EvalSetConfig
from areal_like.errors import EngineError
from areal_like.wire.messages.producer import Lease
from rollout_server.conversation.policy_client import Episode, PolicyClient, Tokenizer
from rollout_server.leases.held_leases import Place
from rollout_server.policy.client import EngineClient
from rollout_server.policy.gate import GenerationGate
from rollout_server.policy.types import Sampling
from rollout_server.sample.attempt import Attempt, SampleRequest, SessionMaker
from rollout_server.sample.environment_attempt import EnvironmentAttempt
from rollout_server.sample.environments import Environments
from rollout_server.sample.prompt_leader import PromptLeader
from rollout_server.sample.prompt_loader import SPLITS, Prompt
from rollout_server.sample.single_turn import SingleTurnAttempt
from rollout_server.tasks.base import Task
from rollout_server.workers.reward_pool import RewardPool

_MAX_SEED = 1 << 31


class AttemptMaker:
    """Makes an attempt for each sample."""

    def __init__(
        self,
        config: Config,
        *,
        task: Task,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        episode: Episode,
        environments: Environments | None,
        rewards: RewardPool,
        gate: GenerationGate,
        on_move: Callable[[int, int, Place], None],
        sessions: SessionMaker | None = None,
        eval_set: EvalSetConfig | None = None,
    ) -> None:
        """`environments`, `sessions`: for a task that has some; else each sample is an `episode`. `on_move`:
        see LeaseRunner. `eval_set`: how to sample; None: as for training."""
        self._tokenizer = tokenizer
        self._episode = episode
        self._environments = environments
        self._sessions = sessions
        self._rewards = rewards
        self._task = task
        self._gate = gate
        self._on_move = on_move
        self._sampling = Sampling(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=stop_token_ids,
            stop=config.sampling.stop,
        )
        if eval_set is not None:
            self._sampling = replace(
                self._sampling,
                max_new_tokens=eval_set.max_new_tokens or config.sampling.max_new_tokens,
                temperature=eval_set.temperature,
                top_p=eval_set.top_p,
                top_k=eval_set.top_k or -1,
                min_p=eval_set.min_p,
            )
        self._sample_timeout_s = config.rollout.sample_timeout_s or math.inf
        self._max_turns = config.episode.max_turns

    @property
    def needs_prompt(self) -> bool:
        """False if an environment gives the prompt. Of the example of a session its label is needed."""
        return self._environments is None

    def begin(
        self,
        engine: EngineClient | None,
        lease: Lease,
        sample_index: int,
        *,
        prompt: Prompt | None,
        leader: PromptLeader,
    ) -> Attempt:
        """`prompt`: None unless `needs_prompt`. Raises EngineError if there is no engine."""
        if engine is None:
            raise EngineError("there is no engine")
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
        request = SampleRequest(
            split=SPLITS[lease.purpose],
            index=lease.prompt_index,
            seed=seed,
            is_greedy=is_greedy,
            policy=policy,
            on_move=partial(self._on_move, lease.lease_id, sample_index),
        )
        if self._sessions is not None:
            assert prompt is not None
            return self._sessions.begin(
                request,
                lease,
                sample_index,
                example=prompt.example,
                rewards=self._rewards if self._task.rewards(prompt.example) else None,
            )
        if prompt is not None:
            return SingleTurnAttempt(
                request,
                prompt=prompt,
                leader=leader,
                episode=self._episode,
                tokenizer=self._tokenizer,
                rewards=self._rewards,
            )
        assert self._environments is not None
        return EnvironmentAttempt(
            request,
            environments=self._environments.pool,
            conversation=self._environments.begin_conversation(policy),
            rewards=self._rewards if self._task.has_reward else None,
            max_turns=self._max_turns,
        )
