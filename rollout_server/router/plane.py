"""The HTTP server of a router: who may send what, before a body is read.

    /health, /livez, /readyz    everybody
    /sessions                   as at a rollout server: with keys, a token of role `agent` or `operator`
    /sessions/ID/...            requests with a key; whether it is the session's, a server decides

Connections, heads and bodies are bounded as at a rollout server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from starlette.types import ASGIApp, Scope

from areal_like.chat.openai import most_bytes
from areal_like.config import Config
from areal_like.http.access import (
    AccessRules,
    Reason,
    Refusal,
    RoleOfToken,
    bearer_token,
    headers_by_name,
    host_names,
)
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keyring import Keyring
from areal_like.security.tls import tls_files
from areal_like.security.tokens import role_of_token
from rollout_server.listening import BACKLOG, listening, url_of
from rollout_server.router.forwarding import HAS_KNOWN_KEY, HEALTH_PATHS, KEYS, digest_of, keys_in
from rollout_server.router.places import BodyPlaces
from rollout_server.router.table import RoutingTable
from rollout_server.sessions.http.rules import (
    WRONG_KEY,
    claim_refusal,
    error_of_refusal,
    most_bytes_of_body,
    session_id,
)

_BODY_TIMEOUT_S = 30.0
_KEEP_ALIVE_S = 75
"""As at rollout servers."""
_WRITE_TIMEOUT_S = 60.0
_MAX_CONNECTIONS = 8192
"""Not by the number of servers: `scale` changes it while a router runs."""
_LONGEST_CONTEXT = 1 << 20
"""Tokens; for the largest body where `rollout.max_context` does not say it. A server has its own limit."""
_MOST_BYTES = "most_bytes"
"""Name in `scope["state"]`: see `RouterPlane._most_bytes_of`."""
_UNSIZED_BYTES = 1 << 20
"""Largest body of a request that does not say its length."""


@dataclass(frozen=True, kw_only=True)
class RouterRules:
    """The check of a request's head."""

    access: AccessRules
    """Of all requests."""
    role_of: RoleOfToken | None

    def refusal(self, scope: Mapping[str, Any]) -> Refusal | None:
        """Returns why a request is refused; None if its body may be read."""
        refusal = self.access.refusal(scope)
        if refusal is not None or scope["path"] in HEALTH_PATHS:
            return refusal
        headers = headers_by_name(scope)
        if not session_id(scope["path"]):
            return claim_refusal(bearer_token(headers), self.role_of)
        keys = scope["state"][KEYS] = keys_in(headers)
        return None if keys else Refusal(401, Reason.TOKEN, WRONG_KEY)


@dataclass(eq=False, kw_only=True)
class RouterPlane:
    """The HTTP server; call `start`, then `close`."""

    config: Config
    app: ASGIApp
    table: RoutingTable
    keyring: Keyring | None
    index: int
    """Number of this router, added to `sessions.router_port`."""
    on_refused: Callable[[Reason], None] = lambda reason: None
    places: BodyPlaces = field(default_factory=BodyPlaces)
    url: str = field(default="", init=False)
    serving: asyncio.Task[None] | None = field(default=None, init=False)
    """Ends when the server does."""
    _server: HttpServer | None = field(default=None, init=False)

    def start(self, *, shutdown_s: int) -> None:
        """Binds and serves. `shutdown_s`: longest wait for open responses at the end. Raises ConfigError if
        the address cannot be bound or needs keys."""
        settings, security, keyring = self.config.sessions, self.config.security, self.keyring
        host = settings.router_host
        require_loopback_or_keys(security, host, setting="sessions.router_host")
        certificate, private_key = tls_files(security)
        others = [*security.allowed_hosts, settings.router_advertise_host]
        guard = HttpGuard(
            self.app,
            RouterRules(
                access=AccessRules(hosts=host_names(host, others=others), open_paths=HEALTH_PATHS),
                role_of=None if keyring is None else lambda token: role_of_token(keyring, token),
            ),
            limits=BodyLimits(max_bytes=self._most_bytes, timeout_s=_BODY_TIMEOUT_S),
            max_bytes_of=self._most_bytes_of,
            on_refused=self.on_refused,
            describe=error_of_refusal,
            place=self._place,
        )
        self._server = HttpServer(
            HttpConfig(
                guard,
                max_connections=_MAX_CONNECTIONS,
                shutdown_s=shutdown_s,
                keep_alive_s=_KEEP_ALIVE_S,
                write_timeout_s=_WRITE_TIMEOUT_S,
                backlog=BACKLOG,
                certificate=certificate,
                private_key=private_key,
            )
        )
        listener = listening(host, settings.router_port, self.index, setting="sessions.router_host")
        self.url = url_of(
            listener, host=host, advertise_host=settings.router_advertise_host, is_tls=bool(certificate)
        )
        self.serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="router")

    async def close(self, *, limit_s: float) -> None:
        """Stops the server; open requests get `shutdown_s` to finish."""
        if self._server is not None and self.serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self.serving], timeout=limit_s)
            self.serving.cancel()

    @cached_property
    def _most_bytes(self) -> int:
        return most_bytes(context_length=self.config.rollout.max_context or _LONGEST_CONTEXT)

    def _most_bytes_of(self, scope: Scope) -> int:
        most: int | None = scope["state"].get(_MOST_BYTES)
        if most is None:
            most = most_bytes_of_body(scope, of_prompts=self._most_bytes)
            most = most if _length(scope) is not None else min(most, _UNSIZED_BYTES)
            scope["state"][_MOST_BYTES] = most
        return most

    def _place(self, scope: Scope) -> contextlib.AbstractContextManager[Refusal | None]:
        """The memory of an accepted request with a session."""
        if not (id := session_id(scope["path"])):
            return contextlib.nullcontext()
        most, length = self._most_bytes_of(scope), _length(scope)
        is_known = any(self.table.is_known(id, digest_of(key)) for key in scope["state"][KEYS])
        scope["state"][HAS_KNOWN_KEY] = is_known
        return _Place(self.places, id, most if length is None else min(length, most), is_known)


@dataclass(eq=False, slots=True)
class _Place(contextlib.AbstractContextManager["Refusal | None", None]):
    """The memory of a request: a refusal on entry if there is none."""

    places: BodyPlaces
    id: str
    num_bytes: int
    is_known: bool
    has_place: bool = False

    def __enter__(self) -> Refusal | None:
        problem = self.places.problem(self.id, self.num_bytes, is_known=self.is_known)
        self.has_place = not problem
        return Refusal(429 if self.is_known else 503, Reason.BUSY, problem) if problem else None

    def __exit__(self, *exc: object) -> None:
        if self.has_place:
            self.places.leave(self.id, self.num_bytes, is_known=self.is_known)


def _length(scope: Scope) -> int | None:
    """The length of a request's body; None if it does not say it."""
    headers = headers_by_name(scope)
    return None if b"transfer-encoding" in headers else int(headers.get(b"content-length") or b"0")
