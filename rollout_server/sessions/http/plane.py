"""The HTTP servers of a rollout server's sessions.

    loopback, a free port, plain HTTP           the server's own agents (`agent()`), always
    sessions.host:port + index of the server    external agents, if a task is `external`; TLS as the job's

Both require the session's key for each request, because other users of the machine can also reach loopback.
Both run in the server's event loop, so the cost that a client can cause is bounded before a request is
handled: connections, size and time of heads and bodies, requests per connection, clients that do not read. At
the start it is checked that there are enough file descriptors for all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from areal_like.chat.openai import most_bytes
from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.http.access import Reason, host_names
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.runtime.daemon import Runtime
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keyring import Keyring
from areal_like.security.tls import tls_files
from areal_like.security.tokens import role_of_token
from rollout_server.listening import BACKLOG, listening, url_of
from rollout_server.policy.engines.sglang.process import server_index
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.http.claims import MAX_WAITING
from rollout_server.sessions.http.elsewhere import Elsewhere, Find, told_at_the_end
from rollout_server.sessions.http.rules import SessionRules, error_of_refusal, most_bytes_of_body
from rollout_server.tasks.base import Task

_LOOPBACK = "127.0.0.1"
_BODY_TIMEOUT_S = 30.0
_KEEP_ALIVE_S = 75
"""How long idle connections stay open, because an agent thinks and calls tools between two requests. Longer
than HTTP clients' pools keep them, so that the client closes first: a request on a connection that the server
is closing would fail."""
_WRITE_TIMEOUT_S = 60.0
_SHUTDOWN_S = 1
_TELL_S, _TELL_SHARE = 10.0, 1 / 3
"""Longest time for which the server of a finished job waits for requests of agents: in seconds, and as a
share of `daemon.drain_timeout_s`."""
_TELL_POLL_S = 0.05
_SPARE_CONNECTIONS = 64
_OTHER_FILES = 256


@contextlib.asynccontextmanager
async def served_sessions(
    runtime: Runtime,
    book: SessionBook,
    *,
    tasks: Sequence[Task],
    model: str,
    context_tokens: int,
    find: Find,
) -> AsyncIterator[SessionPlane | None]:
    """Yields the running HTTP servers; None if no task uses sessions. `find`: asks the buffers for a session
    that this server does not have. Raises ConfigError like SessionPlane."""
    if not any(task.uses_sessions for task in tasks):
        yield None
        return
    config = runtime.config
    app = session_app(
        book,
        model=Path(model).name,
        max_context=context_tokens,
        idle_timeout_s=config.sessions.idle_timeout_s,
        sample_timeout_s=config.rollout.sample_timeout_s or None,
        advertise_host=config.sessions.advertise_host,
        elsewhere=lambda app: Elsewhere(app=app, book=book, name=runtime.name, find=find),
        has_routers=config.sessions.num_routers > 0,
    )
    plane = SessionPlane(
        config=config,
        app=app,
        book=book,
        keyring=runtime.keyring,
        index=server_index(runtime.name),
        needs_external=any(task.external for task in tasks),
        max_body_bytes=most_bytes(context_length=context_tokens),
        on_refused=runtime.count_refused,
    )
    await plane.start()
    runtime.waits.sources.append(book.waits)
    book.url = plane.internal_url
    if plane.external_url:
        runtime.advertise(sessions=plane.external_url)
    try:
        yield plane
    finally:
        book.close()
        await agents_told(book, limit_s=min(_TELL_S, config.daemon.drain_timeout_s * _TELL_SHARE))
        await plane.close()


async def agents_told(book: SessionBook, *, limit_s: float) -> None:
    """Waits until the agents whose sessions were open at the end of the job have been told so, at most
    `limit_s`.

    An agent that is running a tool makes its next request only then. If no server responds, it cannot tell
    the end of the job from a restart.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while book.num_untold:
                await asyncio.sleep(_TELL_POLL_S)


@dataclass(eq=False, kw_only=True)
class SessionPlane:
    """The HTTP servers; call `start`, then `close`."""

    config: Config
    app: ASGIApp
    book: SessionBook
    keyring: Keyring | None
    index: int
    """Number of this rollout server, added to `sessions.port`."""
    needs_external: bool
    """True if external agents make samples."""
    max_body_bytes: int
    """Longest body of a request to the model, in bytes."""
    on_refused: Callable[[Reason], None] = lambda reason: None
    """Called for each refusal, to count it."""
    internal_url: str = field(default="", init=False)
    """URL for this machine: `http://127.0.0.1:PORT`."""
    external_url: str = field(default="", init=False)
    """URL for external agents; empty without them."""
    serving: asyncio.Future[Any] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future(), init=False
    )
    """Ends when the servers do; raises the exception that ended them."""
    _servers: list[HttpServer] = field(default_factory=list, init=False)

    async def start(self) -> None:
        """Binds and serves. Raises ConfigError if an address or a certificate cannot be used, if the address
        needs keys, or if the process may not open enough files."""
        bound: list[tuple[HttpServer, socket.socket]] = []
        try:
            bound.append(self._internal())
            if self.needs_external:
                bound.append(self._external())
            self._require_files([server.config for server, _ in bound])
        except ConfigError:
            for _, listener in bound:
                listener.close()
            raise
        self._servers = [server for server, _ in bound]
        self.serving.cancel()
        self.serving = asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in bound))

    async def close(self) -> None:
        """Stops the servers. Sessions must have ended; requests still open get one second to finish."""
        for server in self._servers:
            server.should_exit = True
        if self._servers:
            await asyncio.wait([self.serving], timeout=_SHUTDOWN_S + 2)
        self.serving.cancel()

    def _internal(self) -> tuple[HttpServer, socket.socket]:
        rules = self._rules(host_names(_LOOPBACK), takes_claims=False)
        listener = listening(_LOOPBACK, 0, 0, setting="sessions.host")
        self.internal_url = url_of(listener, host=_LOOPBACK, advertise_host="", is_tls=False)
        return self._server(rules, max_connections=self._connections_of_samples), listener

    def _external(self) -> tuple[HttpServer, socket.socket]:
        security, sessions = self.config.security, self.config.sessions
        host = sessions.host
        require_loopback_or_keys(security, host, setting="sessions.host")
        certificate, private_key = tls_files(security)
        others = [*security.allowed_hosts, sessions.advertise_host, self.config.rollout.advertise_host]
        rules = self._rules(host_names(host, others=others), takes_claims=True)
        server = self._server(
            rules,
            max_connections=self._connections_of_samples + MAX_WAITING,
            certificate=certificate,
            private_key=private_key,
        )
        listener = listening(host, sessions.port, self.index, setting="sessions.host")
        self.external_url = url_of(
            listener, host=host, advertise_host=sessions.advertise_host, is_tls=bool(certificate)
        )
        return server, listener

    @property
    def _connections_of_samples(self) -> int:
        """Returns the number of connections: two per concurrent sample, plus some spare ones."""
        return 2 * self.config.rollout.most_episodes + _SPARE_CONNECTIONS

    @property
    def _requests_of_a_session(self) -> int:
        """A session's maximum number of concurrent requests: one per allowed turn, at most half of the
        connections, but at least `_SPARE_CONNECTIONS`."""
        turns = min(self.config.episode.max_turns, self._connections_of_samples // 2)
        return max(turns, _SPARE_CONNECTIONS)

    def _rules(self, hosts: frozenset[str], *, takes_claims: bool) -> SessionRules:
        keyring = self.keyring
        return SessionRules(
            book=self.book,
            hosts=hosts,
            role_of=None if keyring is None else lambda token: role_of_token(keyring, token),
            takes_claims=takes_claims,
            most_requests=self._requests_of_a_session,
        )

    def _server(
        self, rules: SessionRules, *, max_connections: int, certificate: str = "", private_key: str = ""
    ) -> HttpServer:
        guard = HttpGuard(
            self.app,
            rules,
            limits=BodyLimits(max_bytes=self.max_body_bytes, timeout_s=_BODY_TIMEOUT_S),
            max_bytes_of=lambda scope: most_bytes_of_body(scope, of_prompts=self.max_body_bytes),
            on_refused=self.on_refused,
            describe=error_of_refusal,
            place=rules.place,
        )
        return HttpServer(
            HttpConfig(
                told_at_the_end(guard),
                max_connections=max_connections,
                shutdown_s=_SHUTDOWN_S,
                keep_alive_s=_KEEP_ALIVE_S,
                write_timeout_s=_WRITE_TIMEOUT_S,
                backlog=min(max_connections, BACKLOG),
                certificate=certificate,
                private_key=private_key,
            )
        )

    def _require_files(self, configs: list[HttpConfig]) -> None:
        """Raises ConfigError if this process may not open files for all connections."""
        wanted = _OTHER_FILES
        for config in configs:
            handshakes = config.max_connections if config.ssl_certfile else 0
            wanted += config.max_connections + config.backlog + handshakes
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY and limit < wanted:
            raise ConfigError(
                f"sessions need {wanted} open files, and the limit of this process is {limit}: raise it "
                f"(`ulimit -n {wanted}`, LimitNOFILE= of systemd), or set a smaller rollout.max_episodes"
            )
