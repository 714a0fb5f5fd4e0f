"""Responds to requests for sessions that this server does not have, or has lost to another server.

The client has the session's key (rules.py), so it may hear where the session is. The buffer knows:

    held by another server         421 session_elsewhere, x-areal-server: URL
    held by this one               waits until the session is restored, then serves the request
    waits for a server             503 session_moved, Retry-After
    over                           410 session_gone, remembered without another question
    (the buffer does not reply)    503 session_moved

The questions in progress are bounded; requests beyond that get 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from areal_like.http.access import bearer_token, header_key, headers_by_name
from areal_like.wire.messages.producer import SessionPlace
from rollout_server.sessions.book import OVER, SessionBook
from rollout_server.sessions.http.errors import ELSEWHERE, MOVED, error_response
from rollout_server.sessions.http.rules import session_id

SERVER_HEADER = "x-areal-server"
"""URL of the server that has a session."""
MAX_QUESTIONS = 64
_RESTORE_S = 10.0
"""Longest wait for a session that this server has leased and not restored yet."""
_POLL_S = 0.05

Find = Callable[[str], Awaitable[SessionPlace | None]]
"""Returns where a session is; None if its buffer does not reply."""


@dataclass(eq=False, kw_only=True)
class Elsewhere:
    """An ASGI application around that of the sessions of this server."""

    app: ASGIApp
    book: SessionBook
    name: str
    """This server's."""
    find: Find
    _num_questions: int = field(default=0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        id = session_id(scope["path"])
        if id and self.book.is_elsewhere(id) and (response := await self._response(id, scope)) is not None:
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _response(self, id: str, scope: Scope) -> Response | None:
        """None: the session is here now."""
        if self._num_questions >= MAX_QUESTIONS:
            return _moved(scope, "many clients ask where their sessions are")
        self._num_questions += 1
        try:
            place = await self.find(id)
            if place is not None and place.server == self.name:
                return await self._restored(id, scope)
        finally:
            self._num_questions -= 1
        if place is None:
            return _moved(scope, "the buffer does not reply, so it is not known where the session is")
        if place.is_over:
            self._note_over(id, scope)
            return error_response(410, OVER, code="session_gone", path=scope["path"])
        if place.server and place.url:
            message = f"the session continues at {place.url}: send its requests there, or to the job's router"
            headers = {SERVER_HEADER: place.url}
            return error_response(421, message, code=ELSEWHERE, path=scope["path"], headers=headers)
        return _moved(scope, "the session's server has died, and another one will continue it")

    async def _restored(self, id: str, scope: Scope) -> Response | None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _RESTORE_S
        while self.book.is_elsewhere(id):
            if loop.time() >= end_s or self.book.is_closed:  # a request left open would be cancelled
                return _moved(scope, "the session is being restored at this server")
            await asyncio.sleep(_POLL_S)
        return None

    def _note_over(self, id: str, scope: Scope) -> None:
        headers = headers_by_name(scope)
        given = (bearer_token(headers), header_key(headers, b"x-api-key"))
        keys = [key for key in given if self.book.keys.is_key(id, key)]
        if keys:  # otherwise the session was here, and its server has lost it
            self.book.note_over(id, keys[0])


def told_at_the_end(app: ASGIApp) -> ASGIApp:
    """The application, with a response to requests that the end of the server cancels: clients ask again."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await app(scope, receive, noting)
        except asyncio.CancelledError:
            if has_begun or scope["type"] != "http":
                raise
            await _moved(scope, "the server is ending")(scope, receive, send)

    return call


def _moved(scope: Scope, why: str) -> Response:
    return error_response(503, f"{why}: ask again", code=MOVED, path=scope["path"])
