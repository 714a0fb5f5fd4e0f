"""The HTTP pages of a daemon, and the server that serves them within the access rules of its job."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from areal_like.config import Config, to_mapping
from areal_like.errors import ArealError, ConfigError
from areal_like.http.access import AccessRules, Reason, host_names
from areal_like.http.discovery import http_port
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.runtime.metrics import CONTENT_TYPE, Metrics
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keyring import Keyring
from areal_like.security.redaction import without_secrets
from areal_like.security.tls import tls_files
from areal_like.security.tokens import role_of_token
from areal_like.wire.sockets import bound_socket

_BODY_LIMITS = BodyLimits(max_bytes=1 << 20, timeout_s=10.0)
"""Limits of a request body; `areal-like drop` with a hundred thousand tickets stays below them."""
_MAX_CONNECTIONS = 128

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Page = Callable[[], Awaitable[bytes]]


class Daemon(Protocol):
    """The daemon behind the pages."""

    config: Config
    role: str
    name: str
    metrics: Metrics
    keyring: Keyring | None
    verbs: dict[str, Verb]
    metrics_pages: dict[str, Page]

    @property
    def not_ready_because(self) -> str:
        """Empty when ready."""

    def describe(self) -> dict[str, Any]:
        """The JSON object of /status."""


class HttpPlane:
    """The HTTP server of one daemon: `bind`, then `start`, then `close`."""

    def __init__(self, daemon: Daemon) -> None:
        """Raises ConfigError if TLS cannot be used."""
        config = daemon.config
        security = config.security
        self._host = config.daemon.http_host
        self._port = http_port(config, role=daemon.role, name=daemon.name)
        others = [
            *security.allowed_hosts,
            config.daemon.advertise_host,
            config.buffer.advertise_host,
            config.rollout.advertise_host,
        ]
        keyring = daemon.keyring
        rules = AccessRules(
            hosts=host_names(self._host, others=others),
            role_of=None if keyring is None else lambda token: role_of_token(keyring, token),
        )
        self._refused = daemon.metrics.counter(
            "http_refused", "HTTP requests refused, by reason.", label="reason", values=list(Reason)
        )
        guard = HttpGuard(
            _pages(daemon),
            rules,
            limits=_BODY_LIMITS,
            on_refused=self.count_refused,
        )
        certificate, private_key = tls_files(security)
        self._server = HttpServer(
            HttpConfig(
                guard, max_connections=_MAX_CONNECTIONS, certificate=certificate, private_key=private_key
            )
        )
        self._security = security
        self._config = config
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    def bind(self) -> int:
        """Binds the daemon's port and returns it.

        Raises ConfigError if the address is not one of this machine or needs keys, or the port is taken.
        """
        require_loopback_or_keys(self._security, self._host, setting="daemon.http_host")
        try:
            self._socket = bound_socket(self._host, self._port)
        except OSError as error:
            if self._port and error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {self._port} is taken, which daemon.http_port={self._config.daemon.http_port} "
                    "gives to this daemon: choose another one, or 0 for a free one"
                ) from None
            raise ConfigError(
                f"cannot bind {self._host} ({error.strerror}): "
                "set daemon.http_host to an address of this machine"
            ) from None
        # From here on the kernel queues connections until the server accepts them; before, it refused them.
        self._socket.listen(128)
        return int(self._socket.getsockname()[1])

    def count_refused(self, reason: Reason) -> None:
        """Counts a request refused here, or by another HTTP server of the daemon."""
        self._refused.labels(reason.value).inc()

    def start(self) -> None:
        """Serves in a task of the running loop."""
        assert self._socket is not None
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")

    async def close(self) -> None:
        """Stops the server, without waiting for open requests."""
        assert self._serving is not None
        self._server.should_exit = True
        self._server.force_exit = True
        await asyncio.wait([self._serving], timeout=2)


def _pages(daemon: Daemon) -> Starlette:
    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        # The reason is in /status: this page needs no token.
        ready = not daemon.not_ready_because
        return PlainTextResponse("ok" if ready else "not ready", status_code=200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(daemon.metrics.exposition(), media_type=CONTENT_TYPE)

    async def metrics_of(request: Request) -> Response:
        page = daemon.metrics_pages.get(request.path_params["part"])
        if page is None:
            known = ", ".join(f"/metrics/{part}" for part in daemon.metrics_pages) or "/metrics only"
            return JSONResponse({"error": f"no such page; known: {known}"}, status_code=404)
        try:
            return Response(await page(), media_type=CONTENT_TYPE)
        except ArealError as error:
            return JSONResponse({"error": str(error)}, status_code=503)

    async def status(_: Request) -> Response:
        return JSONResponse(daemon.describe())

    async def config(_: Request) -> Response:
        return JSONResponse(without_secrets(to_mapping(daemon.config)))

    async def control(request: Request) -> Response:
        verb = daemon.verbs.get(request.path_params["verb"])
        if verb is None:
            return JSONResponse({"error": f"unknown verb; known: {sorted(daemon.verbs)}"}, status_code=404)
        try:
            body = json.loads(await request.body() or b"{}")
            if not isinstance(body, dict):
                raise ValueError("want a JSON object")
            return JSONResponse(await verb(body))
        except ValueError as error:  # UserError is one
            return JSONResponse({"error": str(error)}, status_code=400)
        except RecursionError:
            return JSONResponse({"error": "the body is nested too deeply"}, status_code=400)

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/metrics/{part}", metrics_of),
            Route("/status", status),
            Route("/config", config),
            Route("/control/{verb}", control, methods=["POST"]),
        ]
    )
