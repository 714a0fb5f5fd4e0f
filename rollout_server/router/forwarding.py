"""The requests of agents, passed on to rollout servers: an ASGI application.

    POST /sessions          to a server with a waiting session; the base URLs in the response are the router's
    GET /sessions           the counts of all servers, added up
    /sessions/ID/...        to the server that has the session
    GET /health             200 while a rollout server can be reached

The table (table.py) decides where a request goes next; here are the connections and the limits of each wait.
The path, the body and the agent's key are passed on as they are. Headers of the connection are not, in both
directions. A redirect is not followed, and not passed on: rollout servers send none. A response with a known
length is read before its first byte is passed on, so a server that dies in the middle costs a repetition and
not a broken response; any other, such as a stream of events, is passed on in pieces as they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from starlette.datastructures import URL
from starlette.types import Message, Receive, Scope, Send

from areal_like.errors import UserError
from areal_like.http.access import PROBE_PATHS, HeadersByName, bearer_token, header_key
from areal_like.http.bodies import number, parse_bounded_object
from areal_like.http.guard import Headers
from areal_like.http.server import ON_DISCONNECT
from rollout_server.router.client import ConnectError, Connection, ServerClient
from rollout_server.router.metrics import Outcome, RouterSeries
from rollout_server.router.table import (
    MAX_CLAIMS,
    Ask,
    ClaimWay,
    Pause,
    Retry,
    RoutingTable,
    Server,
    SessionWay,
    Step,
    Stop,
)
from rollout_server.sessions.book import JOB_OVER
from rollout_server.sessions.http.claims import CLIENT_HEADER, MAX_WAIT_S, RETRY_AFTER_S, reached_url
from rollout_server.sessions.http.elsewhere import SERVER_HEADER
from rollout_server.sessions.http.errors import MOVED, error_response, gone_code
from rollout_server.sessions.http.rules import session_id

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 3600.0
"""Longest time until the first byte of a response. Servers limit their work themselves, and one that no
buffer hears from is given up much sooner."""
HEALTH_PATHS = PROBE_PATHS | {"/health"}
"""Pages that need no token."""
KEYS = "keys"
"""Name in `scope["state"]` of a session's request: the keys that it has."""
HAS_KNOWN_KEY = "has_known_key"
"""Name in `scope["state"]` of a session's request: True if a server has accepted its key before."""
CLAIM_SPARE_S = 15.0
"""How much longer than its waiting time a claim may take at a server."""
PIECE_LIMIT_S = 60.0
"""Longest time between two pieces of a response; streams have a comment every 5 s."""
COUNTS_TIMEOUT_S = 5.0
_LOOK_S = 1.0
"""How often requests whose time is over are looked for."""
_MAX_CLAIM_BYTES = 16 << 20
_MAX_TOLD_BYTES = 1 << 16
_LONG_S = 1.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,79}")
_TARGET = re.compile(rb"/[\x21-\x7e]+")
_PLAIN_PATH = re.compile(rb"(/[A-Za-z0-9_-]+)+")
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_OWN_OF_REQUEST = _HOP_BY_HOP | {b"host", b"content-length", b"expect", CLIENT_HEADER}
_OWN_OF_RESPONSE = _HOP_BY_HOP | {b"date", b"server"}
_SERVER_HEADER = SERVER_HEADER.encode()
_RETRY_COUNT = b"x-stainless-retry-count"

T = TypeVar("T")


class _ClientGoneError(Exception):
    """The client has disconnected."""


class _NoAnswerError(Exception):
    """A server has not responded."""

    def __init__(self, reason: Retry, *, is_sent: bool = True) -> None:
        """`is_sent`: False if the server cannot have received the request."""
        super().__init__(reason.value)
        self.reason, self.is_sent = reason, is_sent


class _BrokenError(Exception):
    """A response broke off after its beginning was passed on, or is none that a rollout server sends."""


@dataclass(frozen=True, kw_only=True)
class _Moved:
    """A server does not have the session. `url`: of the one that has it; empty: the session waits for one."""

    url: str = ""


@dataclass(frozen=True, kw_only=True)
class _Gone:
    """A server says that the session is over."""

    headers: Headers
    content: bytes


@dataclass(eq=False, kw_only=True)
class _Request:
    """A request of an agent."""

    scope: Scope
    body: bytes
    send: Send
    gone: asyncio.Future[None]
    """Done when the client has disconnected."""
    begun_s: float
    has_begun: bool = False
    """True once a byte of the response has been sent."""
    asked_s: float = 0.0
    """When the request was sent to the server that has it now."""
    end_s: float = 0.0
    """When it is given up."""
    connecting: asyncio.Timeout | None = None
    """Of the attempt to connect to that server."""
    response: Connection | None = None
    """From that server."""
    is_given_up: bool = False
    """True if that server's response is not waited for any more."""

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def target(self) -> bytes:
        """The path as it was sent, with the query."""
        query: bytes = self.scope["query_string"]
        path: bytes = self.scope["raw_path"]
        return path + b"?" + query if query else path

    def headers(self) -> Headers:
        """Those that are passed on."""
        return passed_on(self.scope["headers"], without=_OWN_OF_REQUEST)

    def leave(self) -> None:
        """The client has disconnected."""
        self.gone.set_result(None)
        self.expire()

    def expire(self) -> None:
        """Gives up what the request waits for at a server."""
        self.is_given_up = True
        if self.response is not None:
            self.response.give_up()
        elif self.connecting is not None:
            with contextlib.suppress(RuntimeError):  # it is ending
                self.connecting.reschedule(-1.0)


def passed_on(headers: Headers, *, without: frozenset[bytes]) -> Headers:
    """The headers without those of the connection, which `Connection` may name too. Names in lower case."""
    if named := [value for name, value in headers if name == b"connection"]:
        without = without | {name.strip().lower() for name in b",".join(named).split(b",")}
    return [header for header in headers if header[0] not in without]


def is_passable(raw_path: bytes, query: bytes) -> bool:
    """True for a path that means the same to every server: printable ASCII, no empty or dotted segments,
    nothing encoded that would be one."""
    if not query and _PLAIN_PATH.fullmatch(raw_path):  # most are
        return True
    if not _TARGET.fullmatch(raw_path) or (query and not re.fullmatch(rb"[\x21-\x7e]+", query)):
        return False
    path = unquote_to_bytes(raw_path)
    if b"\\" in path or any(byte < 0x20 for byte in path):
        return False
    return all(segment not in (b"", b".", b"..") for segment in path[1:].split(b"/"))


def keys_in(headers: HeadersByName) -> list[str]:
    """The keys in a request."""
    return [key for key in (bearer_token(headers), header_key(headers, b"x-api-key")) if key]


def digest_of(key: str) -> bytes:
    """Of a session's key."""
    return hashlib.blake2b(key.encode(), digest_size=32).digest()


@dataclass(eq=False, kw_only=True)
class Forwarding:
    """The ASGI application.

    OPEN -> close(): no request is sent (again) -> give_up(): nor waited for; clients are told to come again
    """

    table: RoutingTable
    client: ServerClient
    series: RouterSeries
    advertise_host: str
    """Host in the base URLs of sessions; empty: the one by which the client reached the router."""
    search_s: float
    """Longest time to look for the server that continues a session."""
    num_streams: int = field(default=0, init=False)
    """Responses that are being passed on in pieces."""
    is_job_over: bool = field(default=False, init=False)
    """True once a server has said so."""
    _is_closing: bool = field(default=False, init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)
    _pending: dict[Server, set[_Request]] = field(default_factory=dict, init=False)
    """Requests at each server."""
    _claims: set[_Request] = field(default_factory=set, init=False)
    """Those that are claims."""
    _looking: asyncio.TimerHandle | None = field(default=None, init=False)
    """Looks for requests whose time is over, while there are any."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, whose body the guard has read."""
        begun_s = self._loop.time()
        message = await receive()
        if message["type"] != "http.request":
            self.series.ended(Outcome.GONE)
            return
        body = message.get("body", b"")
        request = _Request(
            scope=scope, body=body, send=send, gone=self._loop.create_future(), begun_s=begun_s
        )
        scope["state"][ON_DISCONNECT](request.leave)
        try:
            outcome = await self._handled(request)
        except _ClientGoneError:
            outcome = Outcome.GONE
        except _BrokenError as error:
            outcome = Outcome.BROKEN
            log.warning("%s %s: %s", scope["method"], request.path[:200], error)
            if not request.has_begun:
                await self._told(request, 502, str(error), code="bad_gateway")
            # Otherwise the server closes the connection, because the response is incomplete.
        self.series.ended(outcome)

    def lost(self, servers: list[Server]) -> None:
        """Gives up what waits at servers that no buffer hears from any more."""
        for server in servers:
            for request in self._pending.get(server, ()):
                request.expire()

    def close(self) -> None:
        """Sends the claims that wait away, and requests that would be sent to a server from now on."""
        self._is_closing = True
        for request in self._claims:
            request.expire()

    def give_up(self) -> None:
        """Ends the requests that are still at servers, after `close`."""
        for at_server in self._pending.values():
            for request in at_server:
                request.expire()

    @property
    def num_pending(self) -> int:
        """Requests at servers."""
        return sum(map(len, self._pending.values()))

    def waits(self) -> dict[str, float]:
        """What requests wait for -> seconds of the longest wait, for the router's status."""
        now_s = self._loop.time()
        found = {
            f"router: responses of {server.name} to {len(requests)} requests": now_s
            - min(request.asked_s for request in requests)
            for server, requests in self._pending.items()
        }
        return {name: round(seconds, 3) for name, seconds in found.items() if seconds >= _LONG_S}

    async def _handled(self, request: _Request) -> Outcome:
        scope, path, method = request.scope, request.path, request.scope["method"]
        id = session_id(path)
        if path in HEALTH_PATHS and method in ("GET", "HEAD"):
            is_well = path == "/livez" or self.table.available(now_s=self._loop.time())
            content = b"ok" if is_well else b"no rollout server can be reached"
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(content))]
            return await self._passed(request, 200 if is_well else 503, headers, content)
        if is_passable(scope["raw_path"], scope["query_string"]):
            if _ID.fullmatch(id):
                return await self._in_session(request, id)
            if path == "/sessions" and method == "POST":
                return await self._claim(request)
            if path == "/sessions" and method == "GET":
                return await self._counts(request)
        message = f"{method} {path!r:.200}: a router has /sessions, and the routes under /sessions/ID"
        return await self._told(request, 404 if path != "/sessions" else 405, message)

    async def _claim(self, request: _Request) -> Outcome:
        try:
            body = parse_bounded_object(request.body)
            wait_s = number(body, "wait_s", 0.0, low=0.0, high=MAX_WAIT_S)
        except UserError as error:
            return await self._told(request, 400, str(error))
        if self.table.num_claims >= MAX_CLAIMS:
            message = f"{MAX_CLAIMS} agents wait for a session already"
            return await self._told(
                request, 429, message, code="no_session_waits", after_s=RETRY_AFTER_S, outcome=Outcome.BUSY
            )
        loop = self._loop
        way = ClaimWay(table=self.table, end_s=loop.time() + wait_s)
        try:
            while True:
                step = way.next(now_s=loop.time())
                if self._is_closing or isinstance(step, Stop):
                    return await self._unclaimed(request, step)
                if isinstance(step, Pause):
                    await self._pause(step.seconds, request)
                    continue
                outcome = await self._claim_at(step, request, body, way)
                if outcome is not None:
                    return outcome
        finally:
            way.close()

    async def _claim_at(
        self, ask: Ask, request: _Request, body: Mapping[str, Any], way: ClaimWay
    ) -> Outcome | None:
        """None: the claim goes on elsewhere."""
        content = json.dumps({**body, "wait_s": ask.wait_s}).encode()
        headers = request.headers()
        headers.append((CLIENT_HEADER, str((request.scope.get("client") or ("",))[0]).encode()))

        async def take(response: Connection) -> tuple[int, Headers, bytes]:
            return response.status, _headers_of(response), await _content(response, _MAX_CLAIM_BYTES)

        try:
            status, told, answer = await self._asked(
                ask,
                request,
                take,
                body=content,
                headers=headers,
                limit_s=ask.wait_s + CLAIM_SPARE_S,
                is_claim=True,
            )
            sessions = _sessions_in(answer) if status == 200 else []
        except (_NoAnswerError, ValueError) as error:
            way.failed(now_s=self._loop.time())
            self.series.retried(error.reason if isinstance(error, _NoAnswerError) else Retry.UNREACHABLE)
            return None
        code = _code_in(answer) if status in (410, 429, 503) else ""
        self.is_job_over |= code == gone_code(JOB_OVER)
        if code == "no_session_waits":
            way.none()
            self.series.retried(Retry.NONE)
            return None
        if status >= 500 or 300 <= status < 400:
            way.failed(now_s=self._loop.time())
            self.series.retried(Retry.UNREACHABLE)
            return None
        if status == 200:
            way.claimed(num_sessions=len(sessions))
            answer = self._as_routers(answer, sessions, ask.server, request)
        way.done()
        told = [(name, value) for name, value in told if name != b"content-length"]
        told.append((b"content-length", str(len(answer)).encode()))
        return await self._passed(request, status, told, answer)

    def _as_routers(
        self, answer: bytes, sessions: list[dict[str, str]], server: Server, request: _Request
    ) -> bytes:
        """A response with sessions, with base URLs of this router; it notes where they are."""
        base = reached_url(URL(scope=request.scope), advertise_host=self.advertise_host)
        described = json.loads(answer)
        for session in described.get("sessions") or [described]:
            session["base_url"] = f"{base}/sessions/{session['id']}/v1"
        for session in sessions:
            self.table.learn(session["id"], server, digest_of(session["api_key"]))
        return json.dumps(described, separators=(",", ":")).encode()

    async def _unclaimed(self, request: _Request, step: Step) -> Outcome:
        if self.is_job_over and step is not Stop.NONE_WAITS:
            return await self._told(request, 410, JOB_OVER, code=gone_code(JOB_OVER))
        if step is Stop.NONE_WAITS:
            message = "no session waits for an agent: all samples that the job needs now are in progress"
            return await self._told(request, 429, message, code="no_session_waits", after_s=RETRY_AFTER_S)
        message = "the router is ending" if self._is_closing else "no rollout server can be reached now"
        return await self._told(
            request, 503, f"{message}: claim again", code="no_server", after_s=RETRY_AFTER_S
        )

    async def _counts(self, request: _Request) -> Outcome:
        """The sum of what the servers respond to GET /sessions."""

        async def take(response: Connection) -> tuple[int, bytes]:
            return response.status, await _content(response, _MAX_TOLD_BYTES)

        now_s = self._loop.time()
        total = {"waiting": 0, "open": 0}
        for server in self.table.available(now_s=now_s):
            try:
                status, answer = await self._asked(
                    Ask(server, server.url),
                    request,
                    take,
                    body=b"",
                    headers=request.headers(),
                    limit_s=COUNTS_TIMEOUT_S,
                )
                counts = json.loads(answer) if status == 200 else {}
                for name in total:
                    total[name] += int(counts.get(name, 0))
            except (_NoAnswerError, ValueError, TypeError, AttributeError):
                self.table.failed(server, now_s=now_s)
        content = json.dumps(total, separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        return await self._passed(request, 200, headers, content)

    async def _in_session(self, request: _Request, id: str) -> Outcome:
        loop = self._loop
        way = SessionWay(table=self.table, id=id, limit_s=self.search_s)
        while True:
            step = way.next(now_s=loop.time())
            if self._is_closing or isinstance(step, Stop):
                return await self._unserved(request, step)
            if isinstance(step, Pause):
                await self._pause(step.seconds, request)
                continue
            server = step.server

            async def take(response: Connection, server: Server = server) -> Outcome | _Moved | _Gone:
                return await self._judged(response, server, request, id)

            headers = request.headers()
            if way.is_repetition:
                headers = _as_repetition(headers)
            try:
                found = await self._asked(
                    step, request, take, body=request.body, headers=headers, limit_s=ANSWER_LIMIT_S
                )
            except _NoAnswerError as error:
                way.failed(is_sent=error.is_sent, now_s=loop.time())
                self.series.retried(error.reason)
                continue
            if isinstance(found, Outcome):
                way.done()
                return found
            if isinstance(found, _Gone):
                if not way.gone(now_s=loop.time()):
                    self.table.forget(id)
                    return await self._passed(request, 410, found.headers, found.content)
                self.series.retried(Retry.GONE)
                continue
            if found.url:
                way.elsewhere(found.url, now_s=loop.time())
            else:
                way.moved(now_s=loop.time())
            self.series.retried(Retry.ELSEWHERE if found.url else Retry.MOVED)

    async def _judged(
        self, response: Connection, server: Server, request: _Request, id: str
    ) -> Outcome | _Moved | _Gone:
        """Passes a response on, unless it says that the session is not at this server."""
        status = response.status
        if status == 421 and (url := dict(response.headers).get(_SERVER_HEADER)):
            return _Moved(url=url.decode("latin-1").rstrip("/"))
        if status == 503:
            return _Moved()
        if 300 <= status < 400 or status < 200:
            raise _BrokenError(
                f"{server.name} responded with HTTP status {status}, which no rollout server sends"
            )
        if status == 410:
            content = await _content(response, _MAX_TOLD_BYTES)
            self.is_job_over |= _code_in(content) == gone_code(JOB_OVER)
            return _Gone(headers=_headers_of(response), content=content)
        if status < 500 and status not in (401, 403, 404, 421):
            known = self.table.sessions.get(id)
            is_new = known is None or known.server != server.name
            if is_new or not request.scope["state"].get(HAS_KNOWN_KEY):
                self.table.learn(id, server, digest_of(request.scope["state"][KEYS][0]))
        if response.is_complete:
            return await self._passed(request, status, _headers_of(response), response.content())
        return await self._streamed(response, request)

    async def _streamed(self, response: Connection, request: _Request) -> Outcome:
        """Passes a response on piece by piece."""
        loop = self._loop
        self.num_streams += 1
        try:
            await self._begin(request, response.status, _headers_of(response))
            async for piece in response.pieces():
                request.end_s = loop.time() + PIECE_LIMIT_S
                await request.send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            self.num_streams -= 1
        await request.send({"type": "http.response.body", "body": b""})
        return Outcome.PASSED

    async def _asked(
        self,
        ask: Ask,
        request: _Request,
        take: Callable[[Connection], Awaitable[T]],
        *,
        body: bytes,
        headers: Headers,
        limit_s: float,
        is_claim: bool = False,
    ) -> T:
        """Sends a request to a server, and returns what `take` makes of the response.

        Raises _NoAnswerError, _BrokenError, _ClientGoneError.
        """
        reason, is_sent = Retry.UNREACHABLE, True
        self._enter(ask.server, request, limit_s=limit_s, is_claim=is_claim)
        try:
            response = self.client.idle(ask.url) or await self._connected(ask.url, request)
            request.response = response
            try:
                if request.is_given_up:
                    raise TimeoutError
                await response.ask(request.scope["method"], request.target, headers=headers, body=body)
                return await take(response)
            finally:
                request.response = None
                response.release()
        except ConnectError:
            is_sent = False
        except TimeoutError:
            reason = Retry.LOST
        except OSError:
            pass
        finally:
            self._leave(ask.server, request)
        if request.gone.done():
            raise _ClientGoneError
        if request.has_begun:
            raise _BrokenError("the response broke off")
        raise _NoAnswerError(reason, is_sent=is_sent)

    async def _connected(self, url: str, request: _Request) -> Connection:
        """Raises ConnectError, and TimeoutError if the request is given up."""
        async with asyncio.timeout(None) as request.connecting:
            return await self.client.connect(url)

    def _enter(self, server: Server, request: _Request, *, limit_s: float, is_claim: bool) -> None:
        """Begins the wait for a server, until `_leave`. The request is given up after `limit_s`, when the
        client disconnects, and when the server is lost."""
        loop = self._loop
        request.is_given_up = request.gone.done()
        request.asked_s = loop.time()
        request.end_s = request.asked_s + limit_s
        self._pending.setdefault(server, set()).add(request)
        if is_claim:
            self._claims.add(request)
        if self._looking is None:
            self._looking = loop.call_later(_LOOK_S, self._look)

    def _leave(self, server: Server, request: _Request) -> None:
        request.connecting = None
        self._claims.discard(request)
        at_server = self._pending[server]
        at_server.discard(request)
        if not at_server:
            del self._pending[server]

    def _look(self) -> None:
        """Gives up the requests whose time is over: one timer for all costs less than one for each."""
        loop, now_s = self._loop, self._loop.time()
        for at_server in self._pending.values():
            for request in at_server:
                if request.end_s <= now_s:
                    request.expire()
        self._looking = loop.call_later(_LOOK_S, self._look) if self._pending else None

    async def _pause(self, seconds: float, request: _Request) -> None:
        """Raises _ClientGoneError."""
        await asyncio.wait({request.gone}, timeout=seconds)
        if request.gone.done():
            raise _ClientGoneError

    async def _unserved(self, request: _Request, step: Step) -> Outcome:
        if self.is_job_over and step is not Stop.NOT_CONTINUED:
            return await self._told(request, 410, JOB_OVER, code=gone_code(JOB_OVER))
        if self._is_closing:
            why = "the router is ending"
        elif step is Stop.NO_SERVER:
            why = "no rollout server can be reached now"
        else:
            why = f"no rollout server has continued the session within {self.search_s:.0f} s"
        return await self._told(request, 503, f"{why}: ask again", code=MOVED)

    async def _told(
        self,
        request: _Request,
        status: int,
        message: str,
        *,
        code: str | None = None,
        after_s: int = 1,
        outcome: Outcome | None = None,
    ) -> Outcome:
        """Sends a response of the router itself, in the error format of the client's API."""
        headers = {"retry-after": str(after_s)} if status in (429, 503) else {}
        response = error_response(status, message, code=code, path=request.path, headers=headers)
        request.has_begun = True
        await response(request.scope, _nothing, request.send)
        if outcome is not None:
            return outcome
        return Outcome.UNSERVED if status in (410, 429, 503) else Outcome.REFUSED

    async def _passed(self, request: _Request, status: int, headers: Headers, content: bytes) -> Outcome:
        """Sends a whole response."""
        await self._begin(request, status, headers)
        await request.send({"type": "http.response.body", "body": content})
        return Outcome.PASSED

    async def _begin(self, request: _Request, status: int, headers: Headers) -> None:
        request.has_begun = True
        self.series.began(after_s=self._loop.time() - request.begun_s)
        await request.send({"type": "http.response.start", "status": status, "headers": headers})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _headers_of(response: Connection) -> Headers:
    """The headers of a response that are passed on."""
    return passed_on(response.headers, without=_OWN_OF_RESPONSE)


def _as_repetition(headers: Headers) -> Headers:
    """The headers with one more in the number of attempts."""
    counts = [value for name, value in headers if name == _RETRY_COUNT]
    is_number = len(counts) == 1 and re.fullmatch(rb"[0-9]{1,6}", counts[0])
    kept = [header for header in headers if header[0] != _RETRY_COUNT]
    return [*kept, (_RETRY_COUNT, b"%d" % (int(counts[0]) + 1 if is_number else 1))]


async def _content(response: Connection, most: int) -> bytes:
    """The whole body. Raises _BrokenError if it is longer than `most` bytes."""
    content = bytearray()
    async for piece in response.pieces():
        content += piece
        if len(content) > most:
            message = f"the server's response has more than {most} bytes"
            raise _BrokenError(message)
    return bytes(content)


def _code_in(content: bytes) -> str:
    """The code of an error; empty if there is none."""
    try:
        code = json.loads(content)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return code if isinstance(code, str) else ""


def _sessions_in(content: bytes) -> list[dict[str, str]]:
    """Ids and keys in the response to a claim. Raises ValueError if there are none."""
    try:
        described = json.loads(content)
        sessions = described.get("sessions") or [described]
        found = [{"id": one["id"], "api_key": one["api_key"]} for one in sessions]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no sessions: {error}") from None
    if not all(isinstance(one["api_key"], str) and _is_id(one["id"]) for one in found):
        raise ValueError("an id or a key is malformed")
    return found


def _is_id(id: object) -> bool:
    return isinstance(id, str) and _ID.fullmatch(id) is not None
