"""Episodes: the turns of the policy and its environment that extend a prompt to a complete transcript.

An `Episode` alternates two calls: `PolicyClient.extend` appends tokens sampled by the policy,
`Transcript.append_context` appends all other tokens. An episode that uses tools makes these two calls in a
loop (tests/rollout_server/test_episodes.py has an example). Episodes need not handle weight updates: if an
update interrupts a generation (`abort_resume`), `PolicyClient` submits the transcript so far again and
appends the continuation, whose tokens have the new weight version.
"""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError, EngineTimeoutError, EpisodeError, PromptRefusedError
from areal_like.spans.recorder import observe
from areal_like.trajectory import FinishReason
from rollout_server.conversation.transcript import Transcript
from rollout_server.policy.types import Generation, Sampling, SamplingClient
from rollout_server.tasks.base import Example

_MAX_EMPTY_ABORTS = 16
"""Aborts in a row without a new token after which the engine counts as broken: no job updates its weights so
often."""
_SEED_STRIDE = 0x9E3779B1


class Tokenizer(Protocol):
    """The part of a `PromptRenderer` that episodes use."""

    def encode(self, example: Example) -> NDArray[np.int32]:
        """Prompt token ids [P]."""

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Text without special tokens."""

    def text_of(self, tokens: Sequence[int]) -> str:
        """Text with special tokens."""


class PolicyClient:
    """Samples the policy's turns of one episode, and continues them after an abort."""

    def __init__(
        self,
        engine: SamplingClient,
        *,
        sampling: Sampling,
        rid: str,
        gate: AbstractAsyncContextManager[None],
        timeout_s: float = math.inf,
    ) -> None:
        """`sampling.max_new_tokens` limits each turn; `rid` must be unique among running episodes; each
        request is made inside `async with gate` (see GenerationGate). `timeout_s`: of all turns together,
        from the first request on."""
        self._engine = engine
        self._sampling = sampling
        self._rid = rid
        self._gate = gate
        self._num_requests = 0
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        """End of the time limit; None before the first request."""
        self._has_sampled = False
        """True once a turn has a token."""

    @property
    def deadline_s(self) -> float | None:
        """Time of the loop at which the limit of all turns ends; None if there is none, or no request yet."""
        return None if self._deadline_s == math.inf else self._deadline_s

    @property
    def max_new_tokens(self) -> int:
        """Limit of the tokens of one turn."""
        return self._sampling.max_new_tokens

    async def extend(
        self,
        transcript: Transcript,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        keeps_prefix: bool = False,
    ) -> FinishReason:
        """Appends one turn of the policy to the transcript; returns STOP, LENGTH or TIMEOUT, never ABORT.

        `max_new_tokens`: limit of this turn. `stop` and `stop_token_ids`: what ends this turn, beside what
        ends every turn. `keeps_prefix`: another turn may follow. Several turns of an episode may be sampled
        at the same time.
        After TIMEOUT the episode should end. Raises PromptRefusedError if the engine refused the prompt,
        EpisodeError if it refused the prompt with the turns so far (they may have become too long),
        EngineTimeoutError if the policy had sampled nothing at the time limit, and EngineError if the engine
        failed in another way. Cancelling the caller aborts the request.
        """
        sampling = self._sampling
        if max_new_tokens is not None or stop or stop_token_ids or keeps_prefix:
            sampling = replace(
                sampling,
                max_new_tokens=sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
                stop=tuple(dict.fromkeys((*sampling.stop, *stop))),
                stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *stop_token_ids))),
                keeps_prefix=keeps_prefix,
            )
        num_left = sampling.max_new_tokens
        num_empty_aborts = 0
        while True:
            try:
                generation = await self._request(
                    transcript.tokens,
                    sampling=sampling,
                    max_new_tokens=num_left,
                    num_resumed=sampling.max_new_tokens - num_left,
                )
            except EngineTimeoutError:
                if not self._has_sampled:
                    raise
                transcript.finish_reason = FinishReason.TIMEOUT
                return FinishReason.TIMEOUT
            except PromptRefusedError as error:
                if not self._has_sampled:
                    raise
                raise EpisodeError(f"the turns so far cannot be continued: {error}") from error
            transcript.append_sampled(generation)
            self._has_sampled |= len(generation.output_ids) > 0
            num_left -= len(generation.output_ids)
            if generation.finish_reason is not FinishReason.ABORT:
                return generation.finish_reason
            if num_left <= 0:
                transcript.finish_reason = FinishReason.LENGTH
                return FinishReason.LENGTH
            num_empty_aborts = 0 if len(generation.output_ids) else num_empty_aborts + 1
            if num_empty_aborts >= _MAX_EMPTY_ABORTS:
                raise EngineError(
                    f"the engine aborted a request {num_empty_aborts} times without a token: "
                    f"{generation.message}"
                )

    async def _request(
        self, tokens_T: NDArray[np.int32], *, sampling: Sampling, max_new_tokens: int, num_resumed: int
    ) -> Generation:
        """`num_resumed`: tokens at the end that the policy has sampled in this turn before an abort."""
        if self._num_requests:
            # A later request must not draw the same random numbers again, and may only sample the tokens that
            # its turn has left.
            seed = sampling.sampling_seed
            later = None if seed is None else (seed + _SEED_STRIDE * self._num_requests) % (1 << 31)
            sampling = replace(
                sampling, max_new_tokens=max_new_tokens, sampling_seed=later, num_resumed=num_resumed
            )
        rid = f"{self._rid}.{self._num_requests}"
        self._num_requests += 1
        async with self._gate:
            now_s = asyncio.get_running_loop().time()
            if self._deadline_s is None:
                self._deadline_s = now_s + self._timeout_s
            left_s = self._deadline_s - now_s
            if left_s <= 0:
                raise EngineTimeoutError("the time limit was over when the request could be sent again")
            try:
                return await self._engine.generate(
                    tokens_T.tolist(), sampling=sampling, rid=rid, timeout_s=left_s
                )
            finally:
                observe("generations", asyncio.get_running_loop().time() - now_s)


class Episode(ABC):
    """A kind of conversation between policy and environment."""

    @abstractmethod
    async def run(
        self, example: Example, policy: PolicyClient, tokenizer: Tokenizer, transcript: Transcript
    ) -> str:
        """Extends the transcript, which holds the prompt; returns the text for the reward function."""


class SingleTurn(Episode):
    """One prompt, one answer."""

    async def run(
        self, example: Example, policy: PolicyClient, tokenizer: Tokenizer, transcript: Transcript
    ) -> str:
        """Returns the answer's text."""
        await policy.extend(transcript)
        return tokenizer.decode(transcript.sampled)
