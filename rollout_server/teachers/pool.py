"""The teachers at servers: asked for each training sample, after its last turn, beside its reward.

    sample -> its label -> the servers of its teacher -> log-probs of its sampled tokens -> its record
                              |  fails or is late: the next server of the list, after a pause; it is
                              |  avoided for a while, so one that hangs does not delay every sample
                              `> for longer than distill.retry_s: TeacherError, the sample fails

So the trainer never waits for a teacher, and a replay needs none: the log-probs are in the record. A slow
teacher delays its own samples; its servers are among this server's waits. A server that did not respond at
the start is checked before its first sample, and if it turns out to be unsuitable, its samples fail.

Each request is one segment of a sample, from its first sampled token on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from itertools import count
from typing import Self

import numpy as np
from numpy.typing import NDArray

from areal_like.config import Config, DistillConfig
from areal_like.errors import ConfigError, EngineError, TeacherError
from areal_like.trajectory import Trajectory
from rollout_server.policy.http import key_in, tls_of
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.teachers.server import TeacherServer

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_AVOIDED_S = 5.0
"""Least time for which other servers of a teacher are preferred to one that has failed."""
_LATE_S = 2.0
"""Samples that wait longer are listed among the server's waits."""


class TeacherPool:
    """Scores samples. Belongs to one event loop; runs inside `async with`."""

    def __init__(
        self, settings: DistillConfig, *, renderer: PromptRenderer, model: str, longest: int
    ) -> None:
        """`renderer`, `model`: of the policy. `longest`: tokens of the longest sample.

        Raises ConfigError for a file of a key or of certificates that cannot be used.
        """
        self._settings = settings
        self._renderer = renderer
        self._model = model
        self._longest = longest
        self._loop = asyncio.get_running_loop()
        key = key_in(settings.api_key_file, setting="distill.api_key_file")
        tls = tls_of(settings.ca_file, setting="distill.ca_file")
        self._servers = {
            url: TeacherServer(url, api_key=key, tls=tls, timeout_s=settings.timeout_s)
            for urls in settings.servers.values()
            for url in urls
        }
        self._slots = {url: asyncio.Semaphore(settings.max_requests) for url in self._servers}
        self._checks: dict[str, asyncio.Task[None]] = {}
        """The check of each server, running or passed."""
        self._failed_s: dict[str, float] = {}
        """When each server failed that has not responded since."""
        self._numbers, self._turns = count(), count()
        self._since_s: dict[int, tuple[float, str]] = {}
        """When each sample that is not scored was submitted, and the key of its teacher; oldest first."""
        self._last_error: dict[str, str] = {}
        """The last error of each teacher that has failed since its last response."""
        self.num_requests = self.num_failures = 0
        """Requests that were answered, and that failed."""
        self.seconds_total = 0.0
        """Time in requests, summed up."""

    @classmethod
    def of(cls, config: Config, *, renderer: PromptRenderer, model: str, longest: int) -> TeacherPool | None:
        """The pool of a job; None if no teacher is at a server."""
        if not config.distill.servers:
            return None
        return cls(config.distill, renderer=renderer, model=model, longest=longest)

    async def __aenter__(self) -> Self:
        """Checks the servers. Raises ConfigError for one that cannot be a teacher of the policy."""
        found = await asyncio.gather(*map(self._check, self._servers), return_exceptions=True)
        for url, error in zip(self._servers, found, strict=True):
            if isinstance(error, EngineError):
                log.warning("the teacher at %s does not respond, and will be asked again: %s", url, error)
            elif error is not None:
                await self._close()
                raise error
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close()

    async def _close(self) -> None:
        for check in self._checks.values():
            check.cancel()
        for server in self._servers.values():
            await server.close()

    @property
    def num_waiting(self) -> int:
        """Number of samples that are not scored yet."""
        return len(self._since_s)

    def waits(self) -> dict[str, float]:
        """Returns for each teacher how long its oldest sample has waited, with its last error; empty for less
        than `_LATE_S`."""
        now_s = self._loop.time()
        of_keys: dict[str, list[float]] = {}
        for since_s, key in self._since_s.values():
            of_keys.setdefault(key, []).append(now_s - since_s)
        found = {}
        for key, seconds in of_keys.items():
            if (longest_s := max(seconds)) > _LATE_S:
                error = f" ({self._last_error[key]})" if key in self._last_error else ""
                name = f"teachers: {len(seconds)} samples at distill.teachers.{key}{error}"
                found[name] = round(longest_s, 3)
        return found

    async def logprobs(self, trajectory: Trajectory) -> NDArray[np.float32] | None:
        """Log-probs float32[T] of the sampled tokens under the sample's teacher, 0 elsewhere; None if its
        teacher is not at a server.

        Raises TeacherError.
        """
        key = self._settings.teacher_of(trajectory.label)
        if key not in self._settings.servers:
            return None
        if (largest := int(trajectory.tokens.max())) >= self._renderer.num_token_ids:
            raise TeacherError(f"token {largest} is none of the tokenizer's, so no teacher can score it")
        number = next(self._numbers)
        self._since_s[number] = self._loop.time(), key
        try:
            return await self._of_segments(trajectory, key)
        finally:
            del self._since_s[number]

    async def _of_segments(self, trajectory: Trajectory, key: str) -> NDArray[np.float32]:
        logprobs_T = np.zeros(trajectory.num_tokens, np.float32)
        for part in trajectory.segment_slices:
            sampled = np.flatnonzero(trajectory.loss_mask[part])
            if not len(sampled):
                continue
            # A token without a prefix is not trained on.
            first, end = max(1, int(sampled[0])), int(sampled[-1]) + 1
            if end > first:
                scores = await self._ask(trajectory.tokens[part][:end].tolist(), first=first, key=key)
                logprobs_T[part.start + first : part.start + end] = scores
        return logprobs_T * trajectory.loss_mask

    async def _ask(self, tokens: list[int], *, first: int, key: str) -> NDArray[np.float32]:
        """Asks the servers of one teacher in turn until one responds, or `distill.retry_s` has passed."""
        urls, until_s = self._settings.servers[key], self._loop.time() + self._settings.retry_s
        for attempt in count(next(self._turns)):  # begins at another server each time
            url = self._preferred(urls, attempt)
            try:
                async with self._slots[url]:
                    if url != self._preferred(urls, attempt):  # it has failed while this request waited
                        continue
                    await self._check(url)
                    started_s = self._loop.time()
                    scores = await self._servers[url].logprobs(tokens, first=first)
            except (EngineError, ConfigError) as error:
                self.num_failures += 1
                self._failed_s[url] = self._loop.time()
                self._last_error[key] = str(error)[:200]
                pause_s = self._pause_s(until_s)
                if self._loop.time() + pause_s > until_s:
                    raise TeacherError(f"distill.teachers.{key}: {error}") from None
                await asyncio.sleep(pause_s)
            else:
                self.num_requests += 1
                self.seconds_total += self._loop.time() - started_s
                self._last_error.pop(key, None)
                self._failed_s.pop(url, None)
                return scores
        raise AssertionError

    def _preferred(self, urls: Sequence[str], attempt: int) -> str:
        """The next server in turn that has not failed a short while ago; if all have, the next one.

        One that hangs is asked again after as long as it has kept its requests waiting.
        """
        in_turn = [urls[(attempt + at) % len(urls)] for at in range(len(urls))]
        since_s = self._loop.time() - max(_AVOIDED_S, self._settings.timeout_s)
        return min(in_turn, key=lambda url: self._failed_s.get(url, -math.inf) > since_s)

    def _pause_s(self, until_s: float) -> float:
        """Doubles with the time that has passed since the first request."""
        passed_s = self._loop.time() - (until_s - self._settings.retry_s)
        return min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, passed_s))

    async def _check(self, url: str) -> None:
        """Checks a server, unless it has passed. All who wait for it share one check.

        Raises ConfigError, or EngineError if it does not respond.
        """
        if url not in self._checks:
            self._checks[url] = asyncio.create_task(self._checked(url), name=f"check of {url}")
        await asyncio.shield(self._checks[url])

    async def _checked(self, url: str) -> None:
        try:
            await self._servers[url].check(longest=self._longest, renderer=self._renderer, model=self._model)
        except ConfigError as error:
            del self._checks[url]
            raise ConfigError(f"distill.teachers: {url}: {error}") from error
        except EngineError:
            del self._checks[url]
            raise
