"""Asks a service over HTTP, with bounded responses, limited concurrency, and retries with growing pauses.

These are retried: failed or broken connections, timeouts, the statuses 408, 409, 425, 429 and 5xx, and
responses that the caller refuses (TryAgainError). Any other status is an error in the settings or in the
request and fails at once. Pauses honor `Retry-After`. The client never waits beyond the reward's own time
limit: the reward fails before that, with the last problem in its message, so it is not mistaken for a
completion that hangs the verifier.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import ssl
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from areal_like.errors import ConfigError, RewardError
from rollout_server.policy.http import key_in
from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.time_limit import reward_time_left_s
from rollout_server.tasks.base import Completion, Example, Score

V = TypeVar("V")

_RETRIED_STATUSES = frozenset({408, 409, 425, 429})
_LONGEST_PAUSE_S = 30.0
_MARGIN_S = 0.5
"""How long before the reward's time limit the client gives up."""
_MAX_REASON_CHARS = 200


@dataclass
class Counts:
    """Request counts of one reward."""

    calls: int = 0
    """Requests sent."""
    cache_hits: int = 0
    retries: int = 0
    """Requests sent again."""


class TryAgainError(Exception):
    """The request failed, perhaps temporarily. `pause_s`: the pause before the next, if it is known."""

    def __init__(self, message: str, *, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class Place(Protocol):
    """Where a service is."""

    def using(self) -> contextlib.AbstractContextManager[str]:
        """Context of one request, which yields its URL. Raises TryAgainError if there is none now."""

    @property
    def shown(self) -> str:
        """Its name in errors."""


@dataclass(frozen=True)
class OnePlace:
    """A service at one URL."""

    url: str

    def using(self) -> contextlib.AbstractContextManager[str]:
        return contextlib.nullcontext(self.url)

    @property
    def shown(self) -> str:
        return self.url


@dataclass(kw_only=True)
class ServiceClient:
    """Sends requests of one kind. Belongs to one event loop; `close` it at the end."""

    name: str
    """What the service is, in errors: `judge`."""
    place: Place
    api_key: Callable[[], str] = field(repr=False)
    """Returns the API key; empty: none is sent."""
    timeout_s: float
    """Time limit of one request."""
    max_retries: int
    first_pause_s: float
    """Pause before the first retry; each further pause is twice as long."""
    longest_pause_s: float = _LONGEST_PAUSE_S
    max_concurrent: int
    max_reply_bytes: int
    trust: ssl.SSLContext | None = None
    """Certificates that are trusted; None: those of this machine."""

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.max_concurrent)
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, body: Callable[[], bytes], read: Callable[[bytes], V], counts: Counts) -> V:
        """Returns what `read` makes of the response to `body()`, which is JSON; `body` is called for each
        attempt.

        `read` may raise TryAgainError, and RewardError to give up. Raises RewardError after the last retry.
        """
        problem = ""
        for attempt in range(self.max_retries + 1):
            counts.retries += attempt > 0
            pause_s = min(self.first_pause_s * 2 ** min(attempt, 64), self.longest_pause_s)
            try:
                return read(await self._response_to(body(), counts))
            except TryAgainError as error:
                problem = str(error)
                pause_s = pause_s if error.pause_s is None else error.pause_s
            except TimeoutError:
                problem = f"no response within {self.timeout_s:g} s"
            if attempt < self.max_retries:
                if pause_s >= self._time_left_s():
                    raise RewardError(
                        f"{self._shown}: {problem}; not enough of the reward's time limit is "
                        "left for another attempt: raise rollout.reward_timeout_s"
                    )
                await asyncio.sleep(pause_s)
        raise RewardError(f"{self._shown}: {problem}, after {self.max_retries + 1} tries")

    async def get(self, path: str) -> bytes:
        """Returns the response to one GET request. Raises RewardError, TryAgainError or TimeoutError."""
        async with asyncio.timeout(min(self.timeout_s, self._time_left_s())):
            with self.place.using() as url:
                return await self._send("GET", f"{url.rpartition('/')[0]}{path}", None)

    async def close(self) -> None:
        """Closes connections."""
        if self._session is not None:
            await self._session.close()

    @property
    def _shown(self) -> str:
        return f"{self.name} {self.place.shown}"

    async def _response_to(self, body: bytes, counts: Counts) -> bytes:
        """Returns the response to one request."""
        left_s = self._time_left_s()
        try:
            async with asyncio.timeout(min(left_s, 1e9)) as limit, self._slots:
                with self.place.using() as url:
                    counts.calls += 1
                    async with asyncio.timeout(self.timeout_s):
                        return await self._send("POST", url, body)
        except TimeoutError:
            if limit.expired():
                raise RewardError(
                    f"{self._shown}: no response within the {left_s:.1f} s left of the "
                    "reward's time limit: raise rollout.reward_timeout_s, or lower rollout.reward_concurrency"
                ) from None
            raise

    def _time_left_s(self) -> float:
        return max(0.0, reward_time_left_s() - _MARGIN_S)

    async def _send(self, method: str, url: str, body: bytes | None) -> bytes:
        if self._session is None:
            # The slots limit the connections; a pool with its own limit would add a hidden wait.
            self._session = aiohttp.ClientSession(
                trust_env=False,
                connector=aiohttp.TCPConnector(limit=0, ssl=True if self.trust is None else self.trust),
                timeout=aiohttp.ClientTimeout(),
            )
        key = self.api_key()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                content = await self._bounded(response)
                if response.status == 200:
                    return content
                reason = f"HTTP status {response.status}{_reason_in(content)}"
                if response.status in _RETRIED_STATUSES or response.status >= 500:
                    raise TryAgainError(reason, pause_s=_retry_after_s(response.headers.get("Retry-After")))
                raise RewardError(f"{self._shown}: {reason}")
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise TryAgainError(f"{type(error).__name__}: {str(error)[:_MAX_REASON_CHARS]}") from error

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self.max_reply_bytes:
                response.close()
                raise TryAgainError(f"a response of more than {self.max_reply_bytes} bytes")
        return bytes(content)


@dataclass(frozen=True, kw_only=True)
class ServiceReward(RewardFunction):
    """A reward that a service gives."""

    api_key_file: str = ""

    async def score(self, example: Example, completion: Completion) -> Score:
        """Returns the reward. Metrics: `calls`, `cache_hits`, `retries` of this sample, `failures`, and those
        of `_graded`.

        `failures` counts this worker's failed rewards since its last successful one, because a failed sample
        has no metrics of its own. Raises RewardError after the last retry.
        """
        failures, counts = self._failures, Counts()
        try:
            value, metrics = await self._graded(example, completion, counts)
        except RewardError:
            failures[0] += 1
            raise
        metrics |= {key: float(number) for key, number in vars(counts).items()}
        metrics["failures"], failures[0] = float(failures[0]), 0
        return Score(value=value, metrics=metrics)

    async def close(self) -> None:
        """Closes the connections of the running event loop; another one may use this reward afterwards."""
        if (client := self.__dict__.pop("_client", None)) is not None:
            await client.close()

    @abstractmethod
    async def _graded(
        self, example: Example, completion: Completion, counts: Counts
    ) -> tuple[float, dict[str, float]]:
        """Returns the reward and its metrics. The client that it uses is the cached property `_client`."""

    @property
    def _key(self) -> str:
        """The key in `api_key_file`; empty for no file. Raises ConfigError."""
        return key_in(self.api_key_file, setting="task.reward.api_key_file")

    @functools.cached_property
    def _failures(self) -> list[int]:
        return [0]


def check_url(url: str, *, form: str) -> None:
    """Raises ConfigError unless `task.reward.url` is a plain URL. `form`: an example of one."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"task.reward.url={url}: want {form} or https://...")
    if parts.username is not None or parts.query:
        # Refused, and not repeated in the message, because every failure of the service names the URL.
        raise ConfigError(
            "task.reward.url: a user name, password or query does not belong there: put the "
            "key into a file of mode 600 and name it with task.reward.api_key_file"
        )


def check_bounds(reward: object) -> None:
    """Raises ConfigError for a number outside its range among the settings that rewards of services share."""
    for name in ("timeout_s", "max_tokens", "max_concurrent", "max_reply_bytes"):
        if not getattr(reward, name, 1) > 0:
            raise ConfigError(f"task.reward.{name}={getattr(reward, name)}: must be above 0")
    for name in ("max_retries", "first_pause_s", "temperature"):
        if not getattr(reward, name, 0) >= 0:
            raise ConfigError(f"task.reward.{name}={getattr(reward, name)}: must be at least 0")


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
