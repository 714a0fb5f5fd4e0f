"""POST /sessions: an external agent claims the sample of a lease, or all samples of one (`group`).

    session.is_offered -> the response is sent -> claimed
          `------------> the client is gone -> waits again, with another key

A client may wait for a session. Waiting clients are served in the order of their requests.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from areal_like.errors import SessionMovedError
from areal_like.http.access import bearer_token, header_key, headers_by_name
from areal_like.http.bodies import ParamError, flag, number, parse_bounded_object, text
from areal_like.http.streams import disconnected
from areal_like.security.session_keys import nonce_of
from areal_like.wire.limits import MAX_ADDRESS_CHARS
from rollout_server.sessions.book import JOB_OVER, SessionBook
from rollout_server.sessions.claimants import Claimant
from rollout_server.sessions.http.call_response import drained
from rollout_server.sessions.http.errors import error_response, gone_code
from rollout_server.sessions.open_session import AskedLimits, OpenSession, SessionState

MAX_WAIT_S = 30.0
MAX_NAME_CHARS = 100
CLIENT_HEADER = b"x-areal-client"
"""The address of an agent behind a router, in the router's request."""
MAX_WAITING = 1024
"""Maximum number of clients that wait at the same time."""
RETRY_AFTER_S = 5
_DELIVERY_S = 10.0
"""Time limit for sending the response with a session; a client that reads more slowly does not get it."""
_SHORTEST_S = 1.0
"""Shortest time limit that an agent may ask for."""
_LONGEST_S = 1e9
"""Longest one: an integer of any size would not be a time."""


@dataclass(eq=False, kw_only=True)
class ClaimRoutes:
    """The endpoints of /sessions. Belongs to one event loop."""

    book: SessionBook
    advertise_host: str
    """Host in a session's base URL; empty: the one by which the client reached the server."""
    sample_timeout_s: float | None
    idle_timeout_s: float
    has_routers: bool = False
    """True if claims come through routers, which name the agents' addresses."""
    _waiting: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list, init=False)
    """Clients that wait, in the order of their numbers, which are in the order of their requests."""
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.book.on_waiting = self._wake

    async def counts(self, request: Request) -> Response:
        """GET /sessions: how many sessions wait, and how many are open."""
        return JSONResponse({"waiting": self.book.num_waiting, "open": len(self.book.open)})

    async def claim(self, request: Request) -> Response | _Claimed:
        """POST /sessions: claims a session, or all of one prompt."""
        body = parse_bounded_object(await request.body())
        wait_s = number(body, "wait_s", 0.0, low=0.0, high=MAX_WAIT_S)
        asked = AskedLimits(
            deadline_s=number(body, "deadline_s", math.inf, low=_SHORTEST_S, high=_LONGEST_S),
            idle_timeout_s=number(body, "idle_timeout_s", math.inf, low=_SHORTEST_S, high=_LONGEST_S),
        )
        is_group = flag(body, "group")
        offer = self.book.offer_group if is_group else self._offer_one
        claimant = _claimant(request, body, has_routers=self.has_routers)
        if (held := self._held(claimant)) is not None:
            return held
        sessions = offer() if not self._waiting else []
        if not sessions and wait_s and not self.book.is_closed:
            if len(self._waiting) >= MAX_WAITING:
                return _none(f"{MAX_WAITING} clients wait for a session already")
            sessions = await self._wait(request, wait_s, offer)
        if not sessions:
            if self.book.is_job_over:
                return error_response(410, JOB_OVER, code=gone_code(JOB_OVER))
            return _none(
                "the server is ending: claim at another one, or after this one has restarted"
                if self.book.is_closed
                else "no session waits for an agent: all samples that the job needs now are in progress"
            )
        if (held := self._held(claimant)) is not None:  # its other sessions failed while it waited
            self._take_back(sessions)
            return held
        claim_id = secrets.token_hex(8)
        for session in sessions:
            session.claimant, session.asked, session.claim_id = claimant, asked, claim_id
        try:
            # Before the client learns of it: from then on another server could continue it.
            await asyncio.gather(*(one.offered(nonce=nonce_of(one.api_key)) for one in sessions))
            if any(one.state is not SessionState.WAITING for one in sessions):
                raise SessionMovedError("the session was lost while it was offered: claim another")
            return _Claimed(sessions, self._described(request, sessions, is_group=is_group), self.book)
        except SessionMovedError:
            self._take_back(sessions)
            return _none("the session was lost while it was offered")
        except BaseException:
            self._take_back(sessions)
            raise

    def _held(self, claimant: Claimant) -> Response | None:
        """Returns the refusal for a claimant whose sessions fail; None if it may have one."""
        hold = self.book.claimants.hold(claimant, now_s=asyncio.get_running_loop().time())
        if hold is None:
            return None
        if hold.is_refused:
            return error_response(403, hold.reason, code="agent_refused")
        headers = {"retry-after": str(math.ceil(hold.wait_s))}
        return error_response(429, hold.reason, code="agent_slowed", headers=headers)

    def _offer_one(self) -> list[OpenSession]:
        return [] if (session := self.book.offer()) is None else [session]

    def _take_back(self, sessions: list[OpenSession]) -> None:
        for session in sessions:
            self.book.take_back(session)

    def _wake(self) -> None:
        while self._waiting:
            _, first = self._waiting.pop(0)
            if not first.done():
                first.set_result(None)
                if not self.book.is_closed:
                    return

    async def _wait(
        self, request: Request, wait_s: float, offer: Callable[[], list[OpenSession]]
    ) -> list[OpenSession]:
        """Returns the next session or group; empty if there was none in time, or the client disconnected."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + wait_s
        gone = asyncio.ensure_future(disconnected(request.receive))
        number = next(self._numbers)
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((number, turn))
        try:
            while (left_s := end_s - loop.time()) > 0 and not gone.done():
                await asyncio.wait({turn, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() or not turn.done() or self.book.is_closed:
                    return []
                if sessions := offer():
                    return sessions
                turn = loop.create_future()  # it was this client's turn, but nothing was left by then
                bisect.insort(self._waiting, (number, turn), key=itemgetter(0))
            return []
        finally:
            gone.cancel()
            if (number, turn) in self._waiting:
                self._waiting.remove((number, turn))
            if turn.done() and self.book.num_waiting:
                self._wake()  # the next client, in case this one did not take the session it was woken for

    def _described(self, request: Request, sessions: list[OpenSession], *, is_group: bool) -> bytes:
        session, example = sessions[0], sessions[0].example
        base = reached_url(request.url, advertise_host=self.advertise_host)
        shown: dict[str, Any] = {"split": session.split, "index": session.index}
        if example is not None:
            shown |= {
                "prompt": _json(example.prompt),
                "answer": _json(example.answer),
                "metadata": _json(example.metadata),
                "label": example.label,
            }
        own = [
            {
                "id": one.id,
                "base_url": f"{base}/sessions/{one.id}/v1",
                "api_key": one.api_key,
                "sample": one.sample,
            }
            for one in sessions
        ]
        deadline_s = min(self.sample_timeout_s or math.inf, session.asked.deadline_s)
        shared = {
            "example": shown,
            "group": session.group,
            "deadline_s": None if deadline_s == math.inf else deadline_s,
            "idle_timeout_s": session.idle_limit_s(self.idle_timeout_s),
        }
        described = {"sessions": own, **shared} if is_group else {**own[0], **shared}
        return json.dumps(described, separators=(",", ":")).encode()


@dataclass(frozen=True)
class _Claimed:
    """The response with sessions, as an ASGI application; claims them if it was delivered."""

    sessions: list[OpenSession]
    body: bytes
    book: SessionBook

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, unless the client has disconnected."""
        gone = asyncio.ensure_future(disconnected(receive))
        is_sent = False
        try:
            await asyncio.sleep(0)  # after this, a disconnect that has already happened is known
            if not gone.done():
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(self.body)).encode()),
                ]
                async with asyncio.timeout(_DELIVERY_S):
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": self.body, "more_body": True})
                    await drained(send)
                is_sent = not gone.done()
        except TimeoutError:
            return  # the server closes the connection, because the response is incomplete
        finally:
            gone.cancel()
            for session in self.sessions:
                if is_sent and session.state is SessionState.WAITING:
                    session.claim()
                self.book.take_back(session)
        if is_sent:
            await send({"type": "http.response.body", "body": b""})


def reached_url(url: URL, *, advertise_host: str) -> str:
    """The URL of a server for the client of a request, without a path: the one by which the client reached
    it, with the host `advertise_host` unless that is empty."""
    host = advertise_host or url.hostname or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"{url.scheme}://{host}" + (f":{url.port}" if url.port is not None else "")


def _claimant(request: Request, body: Mapping[str, Any], *, has_routers: bool) -> Claimant:
    headers = headers_by_name(request.scope)
    token = bearer_token(headers)
    name = "" if body.get("name") is None else text(body, "name")
    if len(name) > MAX_NAME_CHARS:
        raise ParamError(f"name may have at most {MAX_NAME_CHARS} characters", param="name")
    address = request.client.host if request.client is not None else ""
    # Of a router; another client can only tell apart its own claims by it, as by its name.
    if has_routers and (behind := header_key(headers, CLIENT_HEADER)):
        address = f"{behind[:MAX_ADDRESS_CHARS]} via {address}"
    return Claimant(
        address=address,
        token=hashlib.sha256(token.encode()).hexdigest()[:16] if token else "",
        name=name,
    )


def _none(message: str) -> Response:
    return error_response(429, message, code="no_session_waits", headers={"retry-after": str(RETRY_AFTER_S)})


def _json(value: Any) -> Any:
    """Returns the value if JSON can represent it, otherwise its text."""
    try:
        # Copied through JSON, so that a value that cannot be sent is found here and becomes text.
        return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return repr(value)
