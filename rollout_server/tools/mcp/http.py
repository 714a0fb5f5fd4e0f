"""The HTTP client for one server: it connects to the configured scheme, host and port, and nothing else.

Redirects and compressed bodies are refused, proxies of the environment are not used, certificates are
verified, and all bytes of responses count. The stream for messages outside of requests (GET) is never opened.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from functools import cache

import httpx2

from areal_like.errors import ToolServerError
from rollout_server.tools.mcp.budget import Budget


def client_for(url: str, *, key: str, timeout_s: float, budget: Budget) -> httpx2.AsyncClient:
    """Returns the client. `key`: sent as a bearer token; empty: none. `timeout_s`: of a connection, and of
    each wait for bytes."""
    headers = {"Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return httpx2.AsyncClient(
        transport=_OneOrigin(httpx2.URL(url), budget),
        headers=headers,
        timeout=timeout_s,
        trust_env=False,
        follow_redirects=False,
    )


class _OneOrigin(httpx2.AsyncBaseTransport):
    """A transport that refuses other origins, redirects, and more than a budget of bytes."""

    def __init__(self, url: httpx2.URL, budget: Budget) -> None:
        self._origin = (url.scheme, url.host, url.port)
        self._budget = budget
        self._inner = httpx2.AsyncHTTPTransport(verify=_tls(url.scheme), trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if (request.url.scheme, request.url.host, request.url.port) != self._origin:
            raise self._refused("it made this client ask another host")
        if request.method == "GET":
            return httpx2.Response(405)
        response = await self._inner.handle_async_request(request)
        encoding = response.headers.get("content-encoding", "identity")
        if response.is_redirect or 300 <= response.status_code < 400:
            problem = f"it responded with a redirect (HTTP {response.status_code}), which is not followed"
        elif request.method == "POST" and response.status_code >= 400 and not _is_answer(response):
            problem = f"it responded with HTTP {response.status_code}"
        elif encoding.lower() != "identity":
            problem = f"it sent a body with content-encoding {encoding:.40}"
        else:
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Counted(response.stream, self._budget)
            return response
        await response.aclose()
        raise self._refused(problem)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _refused(self, problem: str) -> ToolServerError:
        self._budget.refuse(problem)
        return ToolServerError(problem)


class _Counted(httpx2.AsyncByteStream):
    """A response's body whose bytes count."""

    def __init__(self, inner: httpx2.AsyncByteStream, budget: Budget) -> None:
        self._inner = inner
        self._budget = budget

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._inner:
            self._budget.take(len(part))
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()


def _is_answer(response: httpx2.Response) -> bool:
    """True if the body may say what is wrong with the request, in the protocol's form."""
    return response.status_code == 400 and response.headers.get("content-type", "").startswith(
        "application/json"
    )


@cache
def _tls(scheme: str) -> ssl.SSLContext:
    """Returns a context that verifies; reading the machine's certificates takes tens of milliseconds."""
    return ssl.create_default_context() if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
