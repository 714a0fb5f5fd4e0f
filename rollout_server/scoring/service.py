"""Scores texts in batches: tokenizes them, queues them, and runs the model in a thread.

    text:  TOKENIZED -> waiting -> in a forward pass -> scored
                           |               `-> failed (the pass raised, or the score is not finite)
                           `-> late: nobody waits for it any more

A text that is too long, cannot be rendered, or has a score that is not finite fails alone. A forward pass
that raises fails its own texts, which their clients send again. Only on a GPU an error other than running out
of memory ends the process, because such a context does not recover; the launcher starts another.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.runtime.metrics import Metrics
from rollout_server.scoring.batching import BatchQueue, Waiting
from rollout_server.scoring.metrics import Refused, ScorerSeries

log = logging.getLogger(__name__)

_LATE_S = 2.0
"""Texts that wait longer are listed among the daemon's waits."""
_FORWARD_ERRORS = (
    *(TypeError, AttributeError, NotImplementedError, IndexError, KeyError, ValueError),
    *(RuntimeError, MemoryError, AssertionError, ArithmeticError),
)
"""What the code of a model may raise; torch's errors are RuntimeErrors."""
_FROZEN_S = 60.0
"""A forward pass that takes longer makes the daemon unready."""


STATUS: Mapping[Refused, int] = {
    Refused.INVALID: 400,
    Refused.TOO_LONG: 400,
    Refused.NOT_FINITE: 422,
    Refused.FULL: 503,
    Refused.LATE: 503,
    Refused.FAILED: 500,
}
"""HTTP status. Those below 500 would be refused again."""


class RefusedTextError(ArealError):
    """A text has no score."""

    def __init__(self, reason: Refused, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Model(Protocol):
    """What is served."""

    vocab_size: int
    survives_errors: bool
    """False if the process must end after an error other than running out of memory."""

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Returns the score of each text."""

    def forget(self) -> None:
        """Frees cached memory, after the device ran out of it."""


class Scored(NamedTuple):
    """The score of one text."""

    score: float
    num_tokens: int


class ScoreService:
    """Belongs to one event loop: `run` in a task, then `score`; `close` at the end."""

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        *,
        identity: str,
        max_length: int,
        max_batch_tokens: int,
        max_waiting: int,
    ) -> None:
        """`max_length`: longest text in tokens."""
        self.identity = identity
        self.max_length = max_length
        self.vocab_size = model.vocab_size
        self._model = model
        self._max_waiting = max_waiting
        self._queue = BatchQueue(max_waiting=max_waiting, max_tokens=max_batch_tokens)
        self._num_tokenizing = 0
        """Texts that wait for the tokenizer."""
        self._loop = asyncio.get_running_loop()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._has_texts = asyncio.Event()
        self._pass_began_s = math.inf
        self._since_s: dict[int, float] = {}
        """When each text that has no score yet arrived, oldest first."""
        self._last_number = 0
        self.failed: asyncio.Future[None] = self._loop.create_future()
        """Receives the exception that must end the process."""
        self._series = ScorerSeries(metrics, num_waiting=lambda: len(self._since_s), identity=identity)

    async def score(self, tokens: Callable[[], list[int]], *, timeout_s: float) -> Scored:
        """Returns the score of the text whose token ids `tokens` returns; it runs in a thread, and may raise
        UserError. `timeout_s`: how long the client waits. Raises RefusedTextError."""
        self._last_number += 1
        number, began_s = self._last_number, self._loop.time()
        self._since_s[number] = began_s
        try:
            ids = await self._tokens_of(tokens)
            self._check(ids)
            text = Waiting(tokens=ids, deadline_s=began_s + timeout_s, done=self._loop.create_future())
            is_added = self._queue.add(text)
            assert is_added, "its place was kept while it was tokenized"
            self._has_texts.set()
            value: float = await text.done
        except UserError as error:
            raise self.refused(RefusedTextError(Refused.INVALID, str(error))) from None
        except RefusedTextError as error:
            raise self.refused(error) from None
        finally:
            del self._since_s[number]
        self._series.scored(num_tokens=len(ids), seconds=self._loop.time() - began_s)
        return Scored(value, len(ids))

    async def _tokens_of(self, tokens: Callable[[], list[int]]) -> list[int]:
        """Raises UserError, and RefusedTextError if too many texts wait for tokenizer and model."""
        num_waiting = self._num_tokenizing + len(self._queue)
        if num_waiting >= self._max_waiting:
            raise RefusedTextError(Refused.FULL, f"{num_waiting} texts wait already: try again later")
        self._num_tokenizing += 1
        try:
            return await self._loop.run_in_executor(self._tokenizing, tokens)
        finally:
            self._num_tokenizing -= 1

    def refused(self, error: RefusedTextError) -> RefusedTextError:
        """Counts an error; returns it."""
        self._series.refused(error.reason)
        return error

    async def run(self) -> None:
        """Runs forward passes until it is cancelled."""
        while True:
            await self._has_texts.wait()
            for late in self._queue.take_late(now_s=self._loop.time()):
                _fail(late, RefusedTextError(Refused.LATE, "it waited longer than the client does"))
            if not (batch := self._queue.take_batch()):
                self._has_texts.clear()
                continue
            await self._pass(batch)

    async def close(self) -> None:
        """Fails the texts that still wait."""
        for text in self._queue.take_all():
            _fail(text, RefusedTextError(Refused.LATE, "the score server ends"))
        for executor in (self._tokenizing, self._scoring):
            executor.shutdown(wait=False, cancel_futures=True)
        self.failed.cancel()
        await asyncio.sleep(0)

    def waits(self) -> dict[str, float]:
        """Returns how long the oldest text has waited; empty for less than `_LATE_S`."""
        oldest_s = next(iter(self._since_s.values()), math.inf)
        seconds = self._loop.time() - oldest_s
        return {f"scores: {len(self._since_s)} texts": round(seconds, 3)} if seconds > _LATE_S else {}

    def trouble(self) -> str:
        """Returns why no text is scored; empty if that works."""
        seconds = self._loop.time() - self._pass_began_s
        return f"a forward pass of the reward model for {seconds:.0f} s" if seconds > _FROZEN_S else ""

    def _check(self, ids: Sequence[int]) -> None:
        if len(ids) > self.max_length:
            raise RefusedTextError(
                Refused.TOO_LONG, f"the text has {len(ids)} tokens: at most {self.max_length} are scored"
            )
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            raise RefusedTextError(
                Refused.INVALID, f"want at least one token id, each from 0 to {self.vocab_size - 1}"
            )

    async def _pass(self, batch: Sequence[Waiting]) -> None:
        began_s = self._pass_began_s = self._loop.time()
        texts = [text.tokens for text in batch]
        try:
            scores = await self._loop.run_in_executor(self._scoring, self._model.scores, texts)
        except _FORWARD_ERRORS as error:
            log.error("a forward pass with %d texts failed: %s", len(batch), error)
            for text in batch:
                what = f"the forward pass failed ({type(error).__name__})"
                _fail(text, RefusedTextError(Refused.FAILED, what))
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                self._model.forget()
            elif not self._model.survives_errors and not self.failed.done():
                self.failed.set_exception(error)
        else:
            for text, score in zip(batch, scores, strict=True):
                if not math.isfinite(score):
                    _fail(text, RefusedTextError(Refused.NOT_FINITE, f"the model's score is {score}"))
                elif not text.done.done():
                    text.done.set_result(score)
        finally:
            self._pass_began_s = math.inf
            self._series.passed([len(text) for text in texts], seconds=self._loop.time() - began_s)


def longest_text(stated: int, *, of_model: int) -> int:
    """Returns the longest text in tokens: `scorer.max_length`, or the model's limit for 0. Raises
    ConfigError."""
    if stated > of_model:
        raise ConfigError(f"scorer.max_length={stated}: the reward model supports {of_model} tokens")
    return stated or of_model


def _fail(text: Waiting, error: RefusedTextError) -> None:
    if not text.done.done():
        text.done.set_exception(error)
