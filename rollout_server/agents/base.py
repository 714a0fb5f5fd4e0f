"""What a task's `agent()` is given: a model that speaks OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass


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
