"""Calls a judge over HTTP, with bounded responses, limited concurrency, and retries with growing pauses.

These are retried: failed or broken connections, timeouts, the statuses 408, 409, 425, 429 and 5xx, responses
that are not chat completions, and replies without a verdict (with another seed, because an equal request
would get an equal reply). Any other status is an error in the settings and fails at once. Pauses honor
`Retry-After`. The client never waits beyond the reward's own time limit: the reward fails before that, with
the last problem in its message, so it is not mistaken for a completion that hangs the verifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp

from areal_like.errors import RewardError
from rollout_server.rewards.library.judge.cache import ReplyCache, key_of
from rollout_server.rewards.library.judge.grading import NoVerdictError
from rollout_server.rewards.time_limit import reward_time_left_s

V = TypeVar("V")

_RETRIED_STATUSES = frozenset({408, 409, 425, 429})
_LONGEST_PAUSE_S = 30.0
_MARGIN_S = 0.5
"""How long before the reward's time limit the client gives up."""
_MAX_REASON_CHARS = 200


@dataclass
class Counts:
    """Request counts of one verdict."""

    calls: int = 0
    """Requests sent."""
    cache_hits: int = 0
    retries: int = 0
    """Requests sent again."""


class _TryAgainError(Exception):
    """The request failed, perhaps temporarily. `pause_s`: the pause that the service asked for, if any."""

    def __init__(self, message: str, *, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.pause_s = pause_s


@dataclass(kw_only=True)
class JudgeClient:
    """Asks a judge for verdicts. Belongs to one event loop; `close` it at the end."""

    url: str
    """The full URL, including /chat/completions."""
    api_key: str = field(repr=False)
    """The API key; empty: none is sent."""
    timeout_s: float
    """Time limit of one request."""
    max_retries: int
    first_pause_s: float
    """Pause before the first retry; each further pause is twice as long."""
    max_concurrent: int
    max_reply_bytes: int
    cache: ReplyCache | None

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_concurrent)
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, body: Mapping[str, Any], read: Callable[[str], V], counts: Counts) -> V:
        """Returns the verdict that `read` finds in the judge's reply to `body`.

        `read` raises NoVerdictError if there is none. Raises RewardError after the last retry.
        """
        # A verdict is cached under the first request, whichever seed led to it, because a rerun starts with
        # that one.
        key = key_of(self.url, body)
        reply = await asyncio.to_thread(self.cache.get, key) if self.cache else None
        if reply is not None:
            with contextlib.suppress(NoVerdictError):  # the cached reply has none: the file was modified
                verdict = read(reply)
                counts.cache_hits += 1
                return verdict
        seed, problem = body.get("seed"), ""
        for attempt in range(self.max_retries + 1):
            counts.retries += attempt > 0
            pause_s = min(self.first_pause_s * 2**attempt, _LONGEST_PAUSE_S)
            try:
                reply = _reply_in(await self._response_to(body, counts))
                verdict = read(reply)
            except NoVerdictError as error:
                problem, pause_s = f"its reply has {error}", 0.0
                if isinstance(seed, int):
                    body = {**body, "seed": seed + attempt + 1}
            except _TryAgainError as error:
                problem = str(error)
                pause_s = pause_s if error.pause_s is None else error.pause_s
            except TimeoutError:
                problem = f"no response within {self.timeout_s:g} s"
            else:
                if self.cache:
                    await asyncio.to_thread(self.cache.put, key, reply)
                return verdict
            if attempt < self.max_retries:
                if pause_s >= self._time_left_s():
                    raise RewardError(
                        f"judge {self.url}: {problem}; not enough of the reward's time limit is "
                        "left for another attempt: raise rollout.reward_timeout_s"
                    )
                await asyncio.sleep(pause_s)
        raise RewardError(f"judge {self.url}: {problem}, after {self.max_retries + 1} tries")

    async def close(self) -> None:
        """Closes connections."""
        if self._session is not None:
            await self._session.close()

    async def _response_to(self, body: Mapping[str, Any], counts: Counts) -> bytes:
        """Returns the response to one request."""
        left_s = self._time_left_s()
        try:
            async with asyncio.timeout(min(left_s, 1e9)) as limit, self._slots:
                counts.calls += 1
                async with asyncio.timeout(self.timeout_s):
                    return await self._post(body)
        except TimeoutError:
            if limit.expired():
                raise RewardError(
                    f"judge {self.url}: no response within the {left_s:.1f} s left of the "
                    "reward's time limit: raise rollout.reward_timeout_s, or lower rollout.reward_concurrency"
                ) from None
            raise

    def _time_left_s(self) -> float:
        return max(0.0, reward_time_left_s() - _MARGIN_S)

    async def _post(self, body: Mapping[str, Any]) -> bytes:
        if self._session is None:
            # The slots limit the connections; a pool with its own limit would add a hidden wait.
            self._session = aiohttp.ClientSession(
                trust_env=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()
            )
        authorization = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            async with self._session.post(
                self.url,
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json", **authorization},
                allow_redirects=False,
            ) as response:
                content = await self._bounded(response)
                if response.status == 200:
                    return content
                reason = f"HTTP status {response.status}{_reason_in(content)}"
                if response.status in _RETRIED_STATUSES or response.status >= 500:
                    raise _TryAgainError(reason, pause_s=_retry_after_s(response.headers.get("Retry-After")))
                raise RewardError(f"judge {self.url}: {reason}")
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise _TryAgainError(f"{type(error).__name__}: {str(error)[:_MAX_REASON_CHARS]}") from error

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self.max_reply_bytes:
                response.close()
                raise _TryAgainError(f"a response of more than {self.max_reply_bytes} bytes")
        return bytes(content)


def _reply_in(content: bytes) -> str:
    """Returns the text of a chat completion."""
    try:
        message = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        message = None
    if not isinstance(message, str):
        raise _TryAgainError("a response that is not a chat completion with text")
    return message


def _reason_in(content: bytes) -> str:
    """Returns the error's message in OpenAI's format, or the start of the response."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    text = " ".join(text.split())[:_MAX_REASON_CHARS]
    return f" ({text})" if text else ""


def _retry_after_s(header: str | None) -> float | None:
    """Returns the seconds in a Retry-After of either form; None if there is none that can be parsed."""
    if header is None:
        return None
    if header.strip().isdecimal() and len(header) < 10:
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
