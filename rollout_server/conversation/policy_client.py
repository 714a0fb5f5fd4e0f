"""Samples the policy's turns for one sample, and continues turns that a weight update interrupted.

After such an abort (`abort_resume`) the tokens sampled so far are submitted again as part of the prompt, and
the continuation is sampled with the new weight version.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError, EngineTimeoutError, EpisodeError, PromptRefusedError
from areal_like.spans.recorder import observe
from areal_like.trajectory import FinishReason
from areal_like.wire.routes import Routes
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Generation, Sampling

_MAX_EMPTY_ABORTS = 16
"""Consecutive aborts without a new token after which the engine is considered broken: no job updates its
weights that often."""
_SEED_STRIDE = 0x9E3779B1


@dataclass
class PolicyClient:
    """Samples from the policy for one sample."""

    engine: EngineClient
    _: KW_ONLY
    sampling: Sampling
    """`max_new_tokens` limits each turn."""
    rid: str
    """Start of the request ids; unique among running samples."""
    gate: AbstractAsyncContextManager[None]
    """Each request is made inside `async with gate` (see GenerationGate)."""
    timeout_s: float = math.inf
    """Time limit of all turns together, counted from the first request."""
    on_first_token: Callable[[], None] | None = None
    """See EngineClient.generate."""
    num_sampled: int = field(default=0, init=False)
    """Number of tokens in all turns, including turns that failed."""
    _cache_salt: str = field(default="", init=False)
    """The engine's salt at the first request."""
    _num_requests: int = field(default=0, init=False)
    _deadline_s: float | None = field(default=None, init=False)
    """End of the time limit; None before the first request."""

    @property
    def deadline_s(self) -> float | None:
        """Loop time at which the time limit expires; None without a limit or before the first request."""
        return None if self._deadline_s == math.inf else self._deadline_s

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of tokens in one turn."""
        return self.sampling.max_new_tokens

    @property
    def num_requests(self) -> int:
        """Number of requests to the engine, on which the random numbers of the next one depend."""
        return self._num_requests

    @property
    def used_s(self) -> float:
        """Part of the time limit that has passed, in seconds; 0 before the first request."""
        if self._deadline_s is None or self._deadline_s == math.inf:
            return 0.0
        return asyncio.get_running_loop().time() - (self._deadline_s - self.timeout_s)

    def resume(self, *, num_requests: int, num_sampled: int, used_s: float) -> None:
        """Continues from these numbers of another server, after the first turn."""
        self._num_requests, self.num_sampled = num_requests, num_sampled
        self._deadline_s = asyncio.get_running_loop().time() + self.timeout_s - used_s

    async def sample(
        self,
        prompt_T: NDArray[np.int32],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        keeps_prefix: bool = False,
    ) -> Generation:
        """Samples one turn after these tokens; the finish reason is STOP, LENGTH or TIMEOUT, never ABORT.

        `max_new_tokens`: limit of this turn. `stop` and `stop_token_ids` end this turn, in addition to the
        job's own. `keeps_prefix`: another turn may follow. Several turns of a sample may be sampled
        concurrently. After TIMEOUT the sample should end. Raises PromptRefusedError if the engine refused the
        prompt, EpisodeError if it refused the prompt with the turns so far (which may be too long by now),
        EngineTimeoutError if nothing was sampled within the time limit, and EngineError if the engine failed
        in another way. Cancelling the caller aborts the request.
        """
        sampling = self.sampling
        if max_new_tokens is not None or stop or stop_token_ids or keeps_prefix:
            sampling = replace(
                sampling,
                max_new_tokens=sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
                stop=tuple(dict.fromkeys((*sampling.stop, *stop))),
                stop_token_ids=tuple(dict.fromkeys((*sampling.stop_token_ids, *stop_token_ids))),
                keeps_prefix=keeps_prefix,
            )
        parts: list[Generation] = []
        num_left = sampling.max_new_tokens
        num_empty_aborts = 0
        while True:
            try:
                generation = await self._request(
                    np.concatenate([prompt_T, *(part.output_ids for part in parts)]) if parts else prompt_T,
                    sampling=sampling,
                    max_new_tokens=num_left,
                    num_resumed=sampling.max_new_tokens - num_left,
                )
            except EngineTimeoutError:
                if not self.num_sampled:
                    raise
                return _joined(parts, FinishReason.TIMEOUT)
            except PromptRefusedError as error:
                if not self.num_sampled:
                    raise
                raise EpisodeError(f"the turns so far cannot be continued: {error}") from error
            parts.append(generation)
            self.num_sampled += len(generation.output_ids)
            num_left -= len(generation.output_ids)
            if generation.finish_reason is not FinishReason.ABORT:
                return _joined(parts, generation.finish_reason)
            if num_left <= 0:
                return _joined(parts, FinishReason.LENGTH)
            num_empty_aborts = 0 if len(generation.output_ids) else num_empty_aborts + 1
            if num_empty_aborts >= _MAX_EMPTY_ABORTS:
                raise EngineError(
                    f"the engine aborted a request {num_empty_aborts} times without a token: "
                    f"{generation.message}"
                )

    async def _request(
        self, tokens_T: NDArray[np.int32], *, sampling: Sampling, max_new_tokens: int, num_resumed: int
    ) -> Generation:
        """`num_resumed`: number of tokens at the end of the prompt that were sampled in this turn before an
        abort."""
        if self._num_requests:
            # A later request must not draw the same random numbers again, and may sample only the number of
            # tokens that remain for its turn.
            seed = sampling.sampling_seed
            later = None if seed is None else (seed + _SEED_STRIDE * self._num_requests) % (1 << 31)
            sampling = replace(
                sampling, max_new_tokens=max_new_tokens, sampling_seed=later, num_resumed=num_resumed
            )
        rid = f"{self.rid}.{self._num_requests}"
        self._num_requests += 1
        async with self.gate:
            now_s = asyncio.get_running_loop().time()
            if self._deadline_s is None:
                self._deadline_s = now_s + self.timeout_s
            left_s = self._deadline_s - now_s
            if left_s <= 0:
                raise EngineTimeoutError("the time limit was over when the request could be sent again")
            # Not earlier: weights may have been pushed while the sample waited for the gate.
            self._cache_salt = self._cache_salt or self.engine.cache_salt
            try:
                return await self.engine.generate(
                    tokens_T.tolist(),
                    sampling=sampling,
                    rid=rid,
                    timeout_s=left_s,
                    cache_salt=self._cache_salt,
                    on_first_token=self.on_first_token,
                )
            finally:
                observe("generations", asyncio.get_running_loop().time() - now_s)


def _joined(parts: Sequence[Generation], finish_reason: FinishReason) -> Generation:
    """Joins the parts of one turn."""
    if len(parts) == 1 and parts[0].finish_reason is finish_reason:
        return parts[0]
    return Generation(
        output_ids=np.concatenate([part.output_ids for part in parts] or [np.empty(0, np.int32)]),
        logprobs=np.concatenate([part.logprobs for part in parts] or [np.empty(0, np.float32)]),
        versions=np.concatenate([part.versions for part in parts] or [np.empty(0, np.int32)]),
        finish_reason=finish_reason,
        routes=_joined_routes(parts),
    )


def _joined_routes(parts: Sequence[Generation]) -> Routes | None:
    """Returns the routes of a turn: of each token those of its first pass. None if a part has none.

    The routes of a part cover its prompt too, which includes the parts before it. Of those tokens only the
    last one went through the model for the first time in this part.
    """
    pieces: list[Routes] = []
    num_known = 0
    for part in parts:
        if not len(part.output_ids):
            continue
        if part.routes is None:
            return None
        pieces.append(part.routes.rows(num_known, part.routes.num_tokens))
        num_known = part.routes.num_tokens
    return Routes.joined(pieces) if pieces else None
