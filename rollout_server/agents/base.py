"""What a task's `agent()` is given: a model that speaks OpenAI's API."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Session:
    """One sample's session with the policy.

    Every program that speaks OpenAI's API can use it: `OpenAI(base_url=..., api_key=...)`. The process of an
    agent also has both as OPENAI_BASE_URL and OPENAI_API_KEY, which most programs read by themselves.
    """

    base_url: str
    """`http://host:port/sessions/<id>/v1`."""
    api_key: str
    """Secret of this session."""


def is_agent(function: Callable[..., Any]) -> bool:
    """True for a coroutine function of self, example and session."""
    try:
        inspect.signature(function).bind("self", "example", "session")
    except TypeError:
        return False
    return inspect.iscoroutinefunction(function)
