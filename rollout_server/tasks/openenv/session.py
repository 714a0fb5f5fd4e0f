"""A session with an OpenEnv server: one WebSocket, on which the server has an environment of its own.

    GET /schema      the schema of actions
    WebSocket /ws    {"type": "reset" or "step", "data": {...}}
                     -> {"type": "observation" or "error", "data": {...}}

The server is not trusted. Nothing is connected to but the address in the settings: redirects are not
followed, proxies of the environment are not used. What it sends is not unpacked, bounded in size and checked;
whatever it does raises EpisodeError. The caller limits the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from areal_like.errors import EpisodeError
from areal_like.trajectory import LARGEST_REWARD

_CLOSE_TIMEOUT_S = 1.0
"""Of each of the two steps of a close."""
_MAX_PINGS = 1000
"""Pings for one request, each of which costs CPU time."""
_MAX_SHOWN_CHARS = 300
_SHOWN_ERRORS = 3


class NoSessionLeftError(EpisodeError):
    """The server has as many sessions as it may have."""


class InvalidActionError(EpisodeError):
    """The server refuses the values of an action; the message says why. The session can be used again."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is."""

    url: str
    key: str
    """Sent as a bearer token; empty: none."""
    max_bytes: int
    """Size of a message or response."""

    def failed(self, problem: str) -> EpisodeError:
        return EpisodeError(f"OpenEnv server at {self.url}: {problem}")

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Turns failures of a connection into EpisodeErrors."""
        try:
            yield
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self.failed(f"{type(error).__name__}: {error!s:.{_MAX_SHOWN_CHARS}}") from None

    def client(self) -> aiohttp.ClientSession:
        headers = {"Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(self._refuse_redirect)
        return aiohttp.ClientSession(
            trust_env=False,
            auto_decompress=False,
            headers=headers,
            trace_configs=[trace],
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def _refuse_redirect(self, *_: object) -> None:
        """Called before a redirect is followed; `ws_connect` has no other way to refuse it."""
        raise self.failed("it responded with a redirect, which is not followed")


@dataclass(frozen=True, kw_only=True)
class Observed:
    """An observation, and what the action before it was worth."""

    fields: Mapping[str, Any]
    reward: float
    done: bool


async def schemas_of(server: Server) -> dict[str, Any]:
    """Returns the response of GET /schema. Raises EpisodeError."""
    body = bytearray()
    with server.asked():
        async with server.client() as client, client.get(f"{server.url}/schema") as response:
            if response.status != 200:
                raise server.failed(f"GET /schema: HTTP status {response.status}")
            async for part in response.content.iter_any():
                body += part
                if len(body) > server.max_bytes:
                    raise server.failed(f"GET /schema: more than max_response_bytes={server.max_bytes}")
    return _json_object(bytes(body), server)


class Session:
    """One session. It answers pings between requests, too: servers close connections that do not."""

    def __init__(
        self, server: Server, client: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse
    ) -> None:
        """Use `connect`."""
        self._server = server
        self._client = client
        self._socket = socket
        self._problem = ""
        """Why the session cannot be used any more."""
        self._response: asyncio.Future[str] | None = None
        """Of the request in progress."""
        self._unasked: str | None = None
        """A message that came without a request: a server that has no session left sends one."""
        self._num_pings = 0
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, server: Server) -> Session:
        """Opens a session. Raises EpisodeError."""
        client = server.client()
        try:
            with server.asked():
                socket = await client.ws_connect(
                    f"{server.url}/ws", autoping=False, max_msg_size=server.max_bytes
                )
        except BaseException:
            await client.close()
            raise
        return cls(server, client, socket)

    async def reset(self, data: Mapping[str, Any]) -> Observed:
        """Starts an episode. Raises EpisodeError, NoSessionLeftError included."""
        try:
            return await self._request("reset", data)
        except InvalidActionError as error:
            raise self._server.failed(f"it refuses the reset: {error}") from None

    async def step(self, data: Mapping[str, Any]) -> Observed:
        """Performs an action. Raises InvalidActionError, NoSessionLeftError or another EpisodeError."""
        return await self._request("step", data)

    def check(self) -> None:
        """Raises EpisodeError if the session cannot be used any more."""
        if self._problem:
            raise self._server.failed(self._problem)

    async def close(self) -> None:
        """Ends the session, for the server too, which closes the connection then."""
        try:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._socket.send_str('{"type": "close"}')
                    await asyncio.wait([self._reading])
            self._reading.cancel()
            await asyncio.wait([self._reading])
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._socket.close()
        finally:
            await self._client.close()

    async def _request(self, kind: str, data: Mapping[str, Any]) -> Observed:
        request = json.dumps({"type": kind, "data": dict(data)}, allow_nan=False)
        was_unasked = self._unasked is not None
        response = _json_object(self._unasked or await self._exchange(kind, request), self._server)
        content = response.get("data")
        if not isinstance(content, dict):
            raise self._server.failed("it sent a message without data")
        if response.get("type") == "error":
            raise self._error(content)
        if was_unasked:
            raise self._server.failed("it sent a message that nothing had asked for")
        if response.get("type") != "observation":
            raise self._server.failed(f"it sent a message of type {response.get('type')!r:.40}")
        return self._observed(content)

    async def _exchange(self, kind: str, request: str) -> str:
        self.check()
        self._response = asyncio.get_running_loop().create_future()
        self._num_pings = 0
        try:
            # If the server has closed the connection, the reader says why.
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await self._socket.send_str(request)
            return await self._response
        except asyncio.CancelledError:
            self._problem = f"it did not respond to {kind} in time"  # and the response may still come
            raise
        finally:
            self._response = None

    async def _read(self) -> None:
        """Receives messages until there is a problem."""
        try:
            while not self._problem:
                await self._take(await self._socket.receive())
        except (aiohttp.ClientError, OSError) as error:
            self._problem = f"the connection failed: {type(error).__name__}"
        if self._response is not None and not self._response.done():
            self._response.set_exception(self._server.failed(self._problem))

    async def _take(self, message: aiohttp.WSMessage) -> None:
        kinds = aiohttp.WSMsgType
        match message.type:
            case kinds.TEXT if self._response is not None and not self._response.done():
                self._response.set_result(message.data)
            case kinds.TEXT if self._unasked is None:
                self._unasked = message.data
            case kinds.TEXT:
                self._problem = "it sent messages that nothing had asked for"
            case kinds.PING:
                self._num_pings += 1
                if self._num_pings > _MAX_PINGS:
                    self._problem = f"it sent more than {_MAX_PINGS} pings for one request"
                await self._socket.pong(message.data)
            case kinds.PONG:
                pass
            case kinds.CLOSE:
                self._problem = f"it closed the connection (code {message.data})"
            case kinds.CLOSING | kinds.CLOSED:
                self._problem = f"the connection was lost (code {self._socket.close_code})"
            case kinds.ERROR if getattr(message.data, "code", 0) == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
                self._problem = f"it sent more than max_response_bytes={self._server.max_bytes} in a message"
            case _:
                self._problem = f"it sent what is no text message ({message.data!s:.100})"

    def _observed(self, content: Mapping[str, Any]) -> Observed:
        fields, reward, done = (content.get(name) for name in ("observation", "reward", "done"))
        if not isinstance(fields, dict) or not isinstance(done, bool):
            raise self._server.failed("it sent no observation, or no done")
        if reward is None:
            reward = 0.0
        if not isinstance(reward, int | float) or not abs(reward) <= LARGEST_REWARD:
            raise self._server.failed(
                f"the reward {reward!r:.40} is no number of at most {LARGEST_REWARD:g} in size"
            )
        return Observed(fields=fields, reward=float(reward), done=done)

    def _error(self, content: Mapping[str, Any]) -> EpisodeError:
        """Returns the exception for an error of the server."""
        said = " ".join(str(content.get("message", "")).split())[:_MAX_SHOWN_CHARS]
        match content.get("code"):
            case "CAPACITY_REACHED":
                return NoSessionLeftError(*self._server.failed(said).args)
            case "VALIDATION_ERROR":
                return InvalidActionError(_details(content.get("errors")) or said)
            case code:
                return self._server.failed(f"it reports an error ({code!s:.40}): {said}")


def _details(errors: Any) -> str:
    """Returns what is wrong with the values of an action, as pydantic says it."""
    found = []
    for error in errors[:_SHOWN_ERRORS] if isinstance(errors, list) else ():
        if isinstance(error, dict) and isinstance(error.get("msg"), str):
            place = error.get("loc")
            names = ".".join(map(str, place)) if isinstance(place, list) else ""
            found.append(f"{names}: {error['msg']}" if names else error["msg"])
    return "; ".join(found)[:_MAX_SHOWN_CHARS]


def _json_object(text: str | bytes, server: Server) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise server.failed("it sent no valid JSON") from None
    if not isinstance(value, dict):
        raise server.failed("it sent JSON that is no object")
    return value


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
