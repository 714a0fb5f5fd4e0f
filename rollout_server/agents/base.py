"""The argument of a task's `agent()`: a session with a model that speaks OpenAI's API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Session:
    """One sample's session with the policy.

    Any program that speaks OpenAI's API can use it: `OpenAI(base_url=..., api_key=...)`. Both values are also
    set in the agent's process as OPENAI_BASE_URL and OPENAI_API_KEY, which most programs read on their own.
    """

    base_url: str
    """`http://host:port/sessions/<id>/v1`."""
    api_key: str
    """The session's secret key."""


def is_agent(function: Callable[..., Any]) -> bool:
    """True if `function` is a coroutine function that takes self, example and session."""
    try:
        inspect.signature(function).bind("self", "example", "session")
    except TypeError:
        return False
    return inspect.iscoroutinefunction(function)
