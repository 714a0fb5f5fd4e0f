"""HTTP requests to one engine over one session; every failure is an EngineError.

Responses are bounded. Redirects are not followed, because they would send the key to another host.
"""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp

from areal_like.errors import ConfigError, EngineError, NoSuchRouteError
from areal_like.security.tokens import read_secret
from rollout_server.policy.generation import MAX_ERROR_CHARS

CONNECT_TIMEOUT_S = 5.0
_CONTROL_TIMEOUT_S = 30.0
"""Time limit of a request that states none."""
_KEEPALIVE_S = 2.0
_MAX_RESPONSE_BYTES = 64 << 20


class EngineHttp:
    """The HTTP session with one engine.

    OPEN -> is_closed = True (`call` raises EngineError) -> close() -> CLOSED
    """

    def __init__(self, base_url: str, *, api_key: str, tls: ssl.SSLContext | None) -> None:
        """`tls`: how to verify an https engine; None: with the system's certificates."""
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls: ssl.SSLContext | bool = tls or True
        self._session: aiohttp.ClientSession | None = None
        self.is_closed = False
        """True once every later `call` is to raise EngineError."""

    async def close(self) -> None:
        self.is_closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            # limit=0 means no limit: each stream occupies a connection, and aborts and weight calls must
            # never queue behind streams. Idle connections are closed before uvicorn closes them after 5 s: a
            # POST on a connection that the server is closing would be lost, and is not retried.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=self._tls),
                headers=self._headers,
            )
        return self._session

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Makes one request; returns the decoded JSON, or {} if the response is plain text.

        Raises EngineError as `fetch` does, and for a response with `success: false`.
        """
        content = await self.fetch(method, path, body, timeout_s=timeout_s)
        try:
            response = json.loads(content)
        except (ValueError, RecursionError):
            return {}  # SGLang's /health and /flush_cache respond in plain text
        if isinstance(response, dict) and response.get("success") is False:
            raise EngineError(f"engine {self.base_url}{path}: {response.get('message', 'success: false')}")
        return response

    async def fetch(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> bytes:
        """Makes one request; returns the body of the response.

        Raises EngineError if it takes longer than `timeout_s`, for a status other than 200
        (NoSuchRouteError for 404), and for a response of more than 64 MiB.
        """
        total_s = _CONTROL_TIMEOUT_S if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=min(total_s, CONNECT_TIMEOUT_S))
        name = f"engine {self.base_url}{path}"
        if self.is_closed:
            raise EngineError(f"{name}: the client was closed")
        try:
            async with self.session.request(
                method, f"{self.base_url}{path}", json=body, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    kind = NoSuchRouteError if response.status == 404 else EngineError
                    raise kind(f"{name}: {await error_text(response)}")
                return await _content(response)
        except TimeoutError:
            raise EngineError(f"{name}: no response within {total_s:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineError(f"{name}: {error or type(error).__name__}") from None


async def error_text(response: aiohttp.ClientResponse) -> str:
    """Returns the message of an error. SGLang sends {"error": {"message"}}, {"message"} or plain text."""
    text = (await _content(response)).decode(errors="replace")
    try:
        body = json.loads(text)
        inner = body.get("error", body) if isinstance(body, dict) else body
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, RecursionError):
        pass
    return f"HTTP {response.status}: {text[:MAX_ERROR_CHARS]}"


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """Returns the body of a response. Raises EngineError if it is too long."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > _MAX_RESPONSE_BYTES:
            raise EngineError(f"{response.url}: the response is longer than {_MAX_RESPONSE_BYTES} bytes")
    return bytes(content)


def key_in(file: str, *, setting: str) -> str:
    """Reads a server's key from a file that the setting names; empty without a file. Raises ConfigError."""
    try:
        return read_secret(Path(file).expanduser()) if file else ""
    except FileNotFoundError:
        raise ConfigError(f"{setting}={file}: no such file") from None


def tls_of(file: str, *, setting: str) -> ssl.SSLContext | None:
    """Returns a context that verifies certificates with those in a file; None without a file. Raises
    ConfigError."""
    try:
        return ssl.create_default_context(cafile=Path(file).expanduser()) if file else None
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{setting}={file}: {error.strerror or error}") from None
