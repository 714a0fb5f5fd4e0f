"""Runs a task's `agent()` in its process, and checks the score on both sides of the socket.

    server -> worker   ["agent", split, index, seed, base_url, api_key]
    worker -> server   null | [value, parts, metrics, turns, tokens]

The score is null if the agent returned None.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from areal_like.errors import EpisodeError, RewardError
from rollout_server.agents.base import Session
from rollout_server.environments.exchange import awaitable
from rollout_server.rewards.scores import as_score, score_fields, score_of
from rollout_server.tasks.base import Completion, Example, Score, Task

_LOOPBACK = "127.0.0.1,localhost"


async def run_agent(task: Task, example: Example, session: Session) -> list[Any] | None:
    """Runs the agent in its process. Returns the score's fields; raises the exceptions of `agent()`."""
    with _variables(session):
        returned = await awaitable(task.agent(example, session), call="agent")
    return None if returned is None else score_fields(_as_score(returned))


def checked_score(fields: Any) -> Score | None:
    """Checks the agent's score in the server; None if the agent returned None. Raises EpisodeError."""
    if fields is None:
        return None
    try:
        score = score_of(fields)
    except (ValueError, TypeError):
        raise EpisodeError("the agent's process sent no valid score") from None
    return _as_score(score)


def _as_score(returned: Any) -> Score:
    """Converts to a Score, or raises EpisodeError that says what to return. Numbers of turns and tokens are
    checked later."""
    turns: Sequence[Any] = getattr(returned, "turns", ())
    tokens: Sequence[Any] = getattr(returned, "tokens", ())
    try:
        of_any_length = Completion("", turn_lengths=turns, token_ids=tokens)
        return as_score(returned, of_any_length, call="agent")
    except (RewardError, TypeError) as error:
        raise EpisodeError(str(error)) from None


@contextlib.contextmanager
def _variables(session: Session) -> Iterator[None]:
    """Sets the variables by which programs find their model, and excludes loopback addresses from proxies."""
    # LangChain and LiteLLM read OPENAI_API_BASE first, and the server's own environment may set it.
    values = dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), session.base_url)
    values["OPENAI_API_KEY"] = session.api_key
    for name in ("no_proxy", "NO_PROXY"):
        values[name] = ",".join(filter(None, (os.environ.get(name, ""), _LOOPBACK)))
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
