"""Asks a judge for verdicts: a service (service.py) whose completions are cached.

A reply without a verdict is retried with another seed, because an equal request would get an equal reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rollout_server.rewards.library.cache import ReplyCache, key_of
from rollout_server.rewards.library.judge.grading import NoVerdictError
from rollout_server.rewards.library.service import Counts, ServiceClient, TryAgainError

V = TypeVar("V")


@dataclass(kw_only=True)
class JudgeClient:
    """Asks a judge for verdicts. Belongs to one event loop; `close` it at the end."""

    url: str
    """The full URL, including /chat/completions."""
    service: ServiceClient
    cache: ReplyCache | None

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
        asked, seed, num_tries = dict(body), body.get("seed"), 0

        def write() -> bytes:
            nonlocal num_tries
            num_tries += 1
            return json.dumps(asked).encode()

        def read_reply(content: bytes) -> tuple[str, V]:
            reply = _reply_in(content)
            try:
                return reply, read(reply)
            except NoVerdictError as error:
                if isinstance(seed, int):
                    asked["seed"] = seed + num_tries
                raise TryAgainError(f"its reply has {error}", pause_s=0.0) from error

        text, verdict = await self.service.ask(write, read_reply, counts)
        if self.cache:
            await asyncio.to_thread(self.cache.put, key, text)
        return verdict

    async def close(self) -> None:
        """Closes connections."""
        await self.service.close()


def _reply_in(content: bytes) -> str:
    """Returns the text of a chat completion."""
    try:
        message = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        message = None
    if not isinstance(message, str):
        raise TryAgainError("a response that is not a chat completion with text")
    return message
