"""Answers ScoreTokens: log-probs of given tokens under the engine's active weights, beside pushes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from areal_like.errors import EngineError, WeightSyncError
from areal_like.wire.channel import Envelope
from areal_like.wire.messages.weights import ScoreTokens, TokenScores, WeightsFailed
from rollout_server.policy.client import EngineClient
from rollout_server.weights.checks import check_score

_TIMEOUT_S = 30.0
"""Longest time that an engine may take; one that is full answers when it has room."""


class Scoring:
    """One request at a time; others are refused meanwhile: IDLE -> start() -> SCORING -> answered -> IDLE."""

    def __init__(self, answer: Callable[[Envelope, TokenScores | WeightsFailed], None]) -> None:
        """`answer`: sends the reply to a request."""
        self._answer = answer
        self._task: asyncio.Task[None] | None = None

    def start(self, envelope: Envelope, *, engine: EngineClient | None, version: int) -> None:
        """Scores and answers in a task. `engine`: None refuses the request. `version`: for a refusal."""
        request: ScoreTokens = envelope.message
        reason = "" if engine is not None else "no engine that this peer may ask"
        if self._task is not None and not self._task.done():
            reason = "another request is being scored"
        try:
            check_score(request)
        except WeightSyncError as error:
            reason = str(error)
        if reason or engine is None:
            self._answer(envelope, WeightsFailed(version=version, reason=reason))
            return
        self._task = asyncio.create_task(self._score(envelope, engine, version), name="weights:ScoreTokens")

    def cancel(self) -> None:
        """Ends the request that is being scored, without an answer."""
        if self._task is not None:
            self._task.cancel()

    async def _score(self, envelope: Envelope, engine: EngineClient, version: int) -> None:
        request: ScoreTokens = envelope.message
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                logprobs, scored_by = await engine.score(request.tokens, first=request.first)
        except (EngineError, TimeoutError) as error:
            reason = str(error) or f"no log-probs within {_TIMEOUT_S:g} s"
            self._answer(envelope, WeightsFailed(version=version, reason=reason))
        else:
            self._answer(envelope, TokenScores(version=scored_by, logprobs=logprobs))
