"""The argument of a task's `agent()`, a session with a model that speaks OpenAI's and Anthropic's APIs; the
default agent.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from areal_like.errors import EpisodeError


@dataclass(frozen=True, kw_only=True)
class Session:
    """One sample's session with the policy.

    Any program that speaks OpenAI's API or Anthropic's can use it: `OpenAI(base_url=..., api_key=...)`,
    `Anthropic(base_url=session.anthropic_base_url, api_key=...)`. In the agent's process these values are
    also in OPENAI_BASE_URL, ANTHROPIC_BASE_URL, OPENAI_API_KEY and ANTHROPIC_API_KEY, which most programs
    read on their own.
    """

    base_url: str
    """`http://host:port/sessions/<id>/v1`."""
    api_key: str = field(repr=False)
    """The session's secret key."""

    @property
    def anthropic_base_url(self) -> str:
        """`http://host:port/sessions/<id>`: clients of Anthropic's API add `/v1/messages`."""
        return self.base_url.removesuffix("/v1")


def is_agent(function: Callable[..., Any]) -> bool:
    """True if `function` is a coroutine function that takes self, example and session."""
    try:
        inspect.signature(function).bind("self", "example", "session")
    except TypeError:
        return False
    return inspect.iscoroutinefunction(function)


async def complete_once(session: Session, messages: list[dict[str, Any]]) -> None:
    """Requests one completion: the agent of an example that has none, in a mixture with agents. Raises
    EpisodeError."""
    await asyncio.to_thread(_post, session, {"model": "policy", "messages": messages})


def _post(session: Session, body: dict[str, Any]) -> None:
    url = urlsplit(f"{session.base_url}/chat/completions")
    assert url.hostname is not None  # the server made this URL
    connection = http.client.HTTPConnection(url.hostname, url.port)
    headers = {"Authorization": f"Bearer {session.api_key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", url.path, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise EpisodeError(f"the model's address does not respond: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise EpisodeError(f"the model responded with HTTP status {response.status}: {content:.300}")
