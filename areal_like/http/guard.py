"""The ASGI wrapper of every HTTP server: applies the access rules and bounds the request's body.

    request head -> AccessRules -> body read within size and time -> the application

The body is read here, so that no endpoint can forget the bound; responses are not touched, so they may
stream. Every refusal closes its connection, so the rest of a refused body is never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from areal_like.http.access import Reason, Refusal, Rules, headers_by_name

ADMITTED = "is_admitted"
"""Key in `scope["state"]` of a request that the rules accept: in a flood its connection is closed last."""
HAS_ARRIVED = "has_arrived"
"""Key in `scope["state"]` of a request whose whole body has arrived, so that reading it takes no time."""


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Bounds of a request's body."""

    max_bytes: int
    timeout_s: float
    """Longest time from the head of a request to the end of its body."""


Headers = list[tuple[bytes, bytes]]
Place = Callable[[Scope], contextlib.AbstractContextManager[Refusal | None]]


def error_text(refusal: Refusal, scope: Scope) -> tuple[bytes, Headers]:
    """The body of a refusal, and headers that belong to it: `{"error": MESSAGE}`."""
    return json.dumps({"error": refusal.message}).encode() + b"\n", []


@dataclass(eq=False)
class HttpGuard:
    """An ASGI application around another one."""

    app: ASGIApp
    rules: Rules
    _: KW_ONLY
    limits: BodyLimits
    max_bytes_of: Callable[[Scope], int] | None = None
    """The body limit of one request, if it differs from that of `limits`."""
    on_refused: Callable[[Reason], None] = lambda reason: None
    """Counts refusals."""
    describe: Callable[[Refusal, Scope], tuple[bytes, Headers]] = error_text
    """Returns the body of a refusal, as JSON, and headers that belong to it."""
    place: Place = lambda scope: contextlib.nullcontext()
    """Entered for a request that the rules accept, and left after its response; yields a refusal if there are
    too many requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        assert scope["type"] == "http", "servers are configured without WebSockets and lifespan"
        refusal = self.rules.refusal(scope)
        if refusal is None:
            scope.setdefault("state", {})[ADMITTED] = True
            with self.place(scope) as refusal:
                if refusal is None:
                    refusal = await self._answer(scope, receive, send)
        if refusal is not None:
            self.on_refused(refusal.reason)
            await self._refuse(refusal, scope, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Refusal | None:
        """The refusal, if the body cannot be read."""
        body = await self._body(scope, receive)
        if isinstance(body, Refusal):
            return body
        if body is None:
            await self.app(scope, receive, send)
        elif body["type"] == "http.request":
            await self.app(scope, _replay(body, receive), send)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> Refusal | Message | None:
        """Reads the body as one message; None if the request has none."""
        headers = headers_by_name(scope)
        most = self.limits.max_bytes if self.max_bytes_of is None else self.max_bytes_of(scope)
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return None
        if int(headers.get(b"content-length") or b"0") > most:
            return _too_long(most)
        if HAS_ARRIVED in scope.get("state", ()):
            return await _read(receive, most)
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await _read(receive, most)
        except TimeoutError:
            return Refusal(408, Reason.SLOW, f"the body did not arrive within {self.limits.timeout_s:g} s")

    async def _refuse(self, refusal: Refusal, scope: Scope, send: Send) -> None:
        content, more = self.describe(refusal, scope)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            *more,
        ]
        if refusal.reason is Reason.TOKEN:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


async def _read(receive: Receive, most: int) -> Refusal | Message:
    """The body as one message, of up to `most` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message
        piece = message.get("body", b"")
        if len(body) + len(piece) > most:
            return _too_long(most)
        if not message.get("more_body", False):
            return message if not body else {**message, "body": bytes(body + piece)}
        body += piece


def _too_long(most: int) -> Refusal:
    return Refusal(413, Reason.BODY, f"the body is larger than the {most} bytes accepted here")


def _replay(body: Message, receive: Receive) -> Receive:
    """A `receive` that returns the body first."""
    left = [body]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed
