"""The response to a request to the model: starts or joins a call, waits, sends, records the delivery.

    body -> begin_call -> Call -> CallResponse: wait -> send -> `call.is_delivered`

A client that disconnects does not cancel its call: an SDK that gave up waiting repeats the request, and gets
the turn of the first one. In a stream the whole response is sent once it is complete; until then, comment
lines keep the connection alive. The status is sent late, so that a streaming request that is refused at once
also gets the status of its error.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from areal_like.chat.responses import ResponsesRequest
from areal_like.http.streams import EVENTS, disconnected
from rollout_server.conversation.turns import SampledTurn
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.errors import NoSessionError, described, error_response
from rollout_server.sessions.open_session import Call, OpenSession, SessionState

KEEP_ALIVE_S = 5.0
"""Time between two comments in a stream, and before its status is sent."""
_COMMENT = b": the policy is being sampled\n\n"

WriteBody = Callable[[Call, SampledTurn], bytes]
"""The whole body: a JSON object, or the events of a stream."""
WriteFailure = Callable[[Call, dict[str, Any]], bytes]
"""The last events of a stream whose call has failed; its second argument is the result of `described`."""


def session_of(request: Request, book: SessionBook) -> OpenSession:
    """Returns the session in the path; its key was checked before. Raises NoSessionError,
    SessionGoneError."""
    id = request.path_params["id"]
    session = book.find(id)
    if session is None or (session.state is SessionState.WAITING and not session.is_offered):
        raise NoSessionError(f"there is no session {id!r:.100} on this server")
    if session.state is SessionState.WAITING:
        session.claim()  # the client was faster than the confirmation that it got the response
    return session


def begin_call(
    request: Request,
    session: OpenSession,
    content: bytes,
    ask: Callable[[], Coroutine[Any, Any, SampledTurn]],
    *,
    response: ResponsesRequest | None = None,
) -> Call:
    """Returns the call for a request with this body; `ask`: the session's `sample_turn` or `continue_tokens`.
    `response`: the request, if its response is to be kept.

    A repetition joins the call of the request that it repeats. Raises SessionGoneError.
    """
    headers = request.headers
    key = headers.get("idempotency-key", "")
    digest = hashlib.sha256(
        b"%d %d " % (len(request.url.path), len(key)) + request.url.path.encode() + key.encode() + content
    ).digest()
    count = headers.get("x-stainless-retry-count", "0")
    is_repetition = bool(key) or (count.isdecimal() and count.strip("0") != "")
    return session.begin(digest, ask, is_repetition=is_repetition, response=response)


@dataclass(eq=False, kw_only=True)
class CallResponse:
    """The response of a call, as an ASGI application: one of the call's readers."""

    call: Call
    write: WriteBody
    write_failure: WriteFailure
    is_stream: bool
    """True if `write` returns server-sent events."""
    keep_alive_s: float = KEEP_ALIVE_S
    _has_begun: bool = field(default=False, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Waits for the turn and sends it, unless the client disconnects."""
        call = self.call
        call.num_readers += 1  # before the first await: an equal request now is not a repetition
        gone = asyncio.ensure_future(disconnected(receive))
        either: set[asyncio.Future[Any]] = {call.task, gone}
        try:
            while not call.task.done() and not gone.done():
                timeout_s = self.keep_alive_s if self.is_stream else None
                await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if self.is_stream and not call.task.done() and not gone.done():
                    await self._send_part(send, _COMMENT)
            if gone.done():
                return
            try:
                turn = await call.turn()
                call.body = body = call.body or self.write(call, turn)
            except Exception as error:  # `described` raises what it does not know
                if self._has_begun:
                    await self._send_part(send, self.write_failure(call, described(error)))
                    await send({"type": "http.response.body", "body": b""})
                else:
                    await error_response(**described(error), path=scope["path"])(scope, receive, send)
                return
            await self._send_part(send, body)
            await drained(send)
            call.is_delivered = call.is_delivered or not gone.done()
            await send({"type": "http.response.body", "body": b""})
        finally:
            call.num_readers -= 1
            if not call.num_readers:
                call.body = None
            gone.cancel()

    async def _send_part(self, send: Send, body: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            if self.is_stream:
                headers = [(b"content-type", EVENTS.encode()), (b"cache-control", b"no-cache")]
            else:
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def drained(send: Send) -> None:
    """Waits until the client has read everything sent, except what fits into buffers."""
    # uvicorn waits for its buffer at the start of each message, not at the end.
    await send({"type": "http.response.body", "body": b"", "more_body": True})
