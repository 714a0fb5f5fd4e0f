"""From an example to a transcript: the loop between policy and world.

An `Episode` decides the order of turns. `PolicyClient.extend` appends what the policy samples, `Transcript.give` appends
context (prompt, tool output, the next user turn): everything given has loss mask zero, everything sampled has one, EOS
included. Interruption by a weight update (`abort_resume`) is invisible from here on: the speaker resubmits what was said so far and stitches tokens, log-probs and versions.
A tool-using episode is the same three lines in a loop (tests/rollout_server/test_episodes.py has one).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from rollout_server.inference.client import Generation, Sampling
from rollout_server.tasks.base import Example

_MAX_FRUITLESS_ABORTS = 16
"""Aborts in a row without a single new token before we say that the engine is broken: weight updates are not that frequent."""
_SEED_STRIDE = 0x9E3779B1


class Engine(Protocol):
    """What an episode needs of an engine; `EngineClient` is one."""

    async def generate(
        self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None = None
    ) -> Generation:
        """See EngineClient.generate."""


class Tokenizer(Protocol):
    """What an episode needs of a tokenizer; `PromptRenderer` is one."""

    def encode(self, example: Example) -> NDArray[np.int32]:
        """Prompt token ids [P]."""

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Text without special tokens."""


@dataclass(kw_only=True, eq=False)
class Transcript:
    """What was said so far, by whom, and under which weights. Grows at its end only."""

    finish_reason: FinishReason = FinishReason.STOP
    """Why the policy's last turn ended."""
    _tokens: list[NDArray[np.int32]] = field(default_factory=list)
    _logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    _versions: list[NDArray[np.int32]] = field(default_factory=list)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[T] everything so far."""
        return np.concatenate(self._tokens) if self._tokens else np.empty(0, np.int32)

    @property
    def sampled(self) -> NDArray[np.int32]:
        """What the policy said, in one array without the rest."""
        return self.tokens[self._sampled_mask()]

    def give(self, tokens_T: NDArray[np.int32]) -> None:
        """The world speaks: tokens that are not trained on."""
        self._append(
            tokens_T, np.zeros(len(tokens_T), np.float32), np.full(len(tokens_T), NOT_SAMPLED, np.int32)
        )

    def say(self, generation: Generation) -> None:
        """The policy speaks."""
        self._append(generation.output_ids, generation.logprobs, generation.versions)
        self.finish_reason = generation.finish_reason

    def to_trajectory(
        self,
        *,
        reward: float,
        reward_components: dict[str, float],
        generation_s: float,
        reward_s: float,
        is_greedy: bool = False,
    ) -> Trajectory:
        """The transcript with its reward. Raises ValueError where the engine's numbers make no sense."""
        return Trajectory(
            tokens=self.tokens,
            loss_mask=self._sampled_mask().astype(np.uint8),
            logprobs=np.concatenate(self._logprobs),
            versions=np.concatenate(self._versions),
            reward=reward,
            reward_components=reward_components,
            finish_reason=self.finish_reason,
            is_greedy=is_greedy,
            generation_s=generation_s,
            reward_s=reward_s,
        )

    def _append(
        self, tokens_T: NDArray[np.int32], logprobs_T: NDArray[np.float32], versions_T: NDArray[np.int32]
    ) -> None:
        self._tokens.append(tokens_T)
        self._logprobs.append(logprobs_T)
        self._versions.append(versions_T)

    def _sampled_mask(self) -> NDArray[np.bool_]:
        return np.concatenate(self._versions) != NOT_SAMPLED if self._versions else np.empty(0, np.bool_)


class GenerationGate:
    """Counts who is at the engine, and can hold back who comes next: how a `drain` update waits for running sequences.

    OPEN -> hold() -> HELD (those inside finish, newcomers wait) -> release() -> OPEN
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self.num_inside = 0

    async def __aenter__(self) -> None:
        await self._open.wait()
        self.num_inside += 1
        self._empty.clear()

    async def __aexit__(self, *exc: object) -> None:
        self.num_inside -= 1
        if self.num_inside == 0:
            self._empty.set()

    def hold(self) -> None:
        """Newcomers wait from now on."""
        self._open.clear()

    def release(self) -> None:
        """Newcomers go on."""
        self._open.set()

    async def wait_empty(self) -> None:
        """Until nobody is at the engine."""
        await self._empty.wait()


class PolicyClient:
    """The policy's voice in one episode: sampling parameters, request ids, resumption after an interrupted generation."""

    def __init__(
        self, engine: Engine, *, sampling: Sampling, rid: str, turnstile: AbstractAsyncContextManager[None]
    ) -> None:
        """`sampling.max_new_tokens` limits each turn; `rid` must be unique among running episodes."""
        self._engine = engine
        self._sampling = sampling
        self._rid = rid
        self._turnstile = turnstile
        self._num_requests = 0

    async def extend(self, transcript: Transcript) -> FinishReason:
        """The policy's turn: appends its tokens to the transcript; returns STOP or LENGTH, never ABORT.

        Raises EngineError if the engine refused or died. Cancelling it aborts the request at the engine.
        """
        room = self._sampling.max_new_tokens
        num_fruitless = 0
        while True:
            generation = await self._request(transcript.tokens, max_new_tokens=room)
            transcript.say(generation)
            room -= len(generation.output_ids)
            if generation.finish_reason is not FinishReason.ABORT:
                return generation.finish_reason
            if room <= 0:
                transcript.finish_reason = FinishReason.LENGTH
                return FinishReason.LENGTH
            num_fruitless = 0 if len(generation.output_ids) else num_fruitless + 1
            if num_fruitless >= _MAX_FRUITLESS_ABORTS:
                raise EngineError(
                    f"the engine aborted a request {num_fruitless} times without a token: {generation.message}"
                )

    async def _request(self, tokens_T: NDArray[np.int32], *, max_new_tokens: int) -> Generation:
        sampling = self._sampling
        if self._num_requests:
            # A later request must not draw the same random numbers again, and has what is left of its turn.
            seed = sampling.sampling_seed
            later = None if seed is None else (seed + _SEED_STRIDE * self._num_requests) % (1 << 31)
            sampling = replace(sampling, max_new_tokens=max_new_tokens, sampling_seed=later)
        rid = f"{self._rid}.{self._num_requests}"
        self._num_requests += 1
        async with self._turnstile:
            return await self._engine.generate(tokens_T.tolist(), sampling=sampling, rid=rid)


class Episode(ABC):
    """One kind of conversation."""

    @abstractmethod
    async def run(
        self, example: Example, speaker: PolicyClient, tokenizer: Tokenizer, transcript: Transcript
    ) -> str:
        """Fills the transcript (it holds the prompt already) and returns the text that the reward function is given."""


class SingleTurn(Episode):
    """Prompt, answer, end."""

    async def run(
        self, example: Example, speaker: PolicyClient, tokenizer: Tokenizer, transcript: Transcript
    ) -> str:
        """The answer."""
        await speaker.extend(transcript)
        return tokenizer.decode(transcript.sampled)
