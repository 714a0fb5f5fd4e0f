"""Serves the sessions of a rollout server over HTTP, if one of its tasks uses sessions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from areal_like.chat.openai import most_bytes
from areal_like.runtime.daemon import Runtime
from rollout_server.policy.engines.sglang.process import server_index
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.http.plane import SessionPlane
from rollout_server.tasks.base import Task

_FIRST_ERROR = 400


@contextlib.asynccontextmanager
async def served_sessions(
    runtime: Runtime, book: SessionBook, *, tasks: Sequence[Task], model: str, context_tokens: int
) -> AsyncIterator[SessionPlane | None]:
    """Yields the running HTTP servers; None if no task uses sessions. Raises ConfigError like
    SessionPlane."""
    if not any(task.uses_sessions for task in tasks):
        yield None
        return
    config = runtime.config
    app = session_app(
        book,
        model=Path(model).name,
        max_context=context_tokens,
        idle_timeout_s=config.sessions.idle_timeout_s,
        sample_timeout_s=config.rollout.sample_timeout_s or None,
        advertise_host=config.sessions.advertise_host,
        on_ignored=lambda name: book.num_ignored.update([name]),
    )
    plane = SessionPlane(
        config=config,
        app=_counted(app, book),
        book=book,
        keyring=runtime.keyring,
        index=server_index(runtime.name),
        needs_external=any(task.external for task in tasks),
        max_body_bytes=most_bytes(context_length=context_tokens),
        on_refused=runtime.count_refused,
    )
    await plane.start()
    runtime.waits.sources.append(book.waits)
    book.url = plane.internal_url
    if plane.external_url:
        runtime.advertise(sessions=plane.external_url)
    try:
        yield plane
    finally:
        book.close()
        await plane.close()


def _counted(app: ASGIApp, book: SessionBook) -> ASGIApp:
    """Wraps the application to count its refusals. (Refusals before it are counted by `on_refused`.)"""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= _FIRST_ERROR:
                book.num_refused[message["status"]] += 1
            await send(message)

        await app(scope, receive, sent)

    return call
