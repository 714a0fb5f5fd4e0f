"""Decides which HTTP requests are accepted: a check of the request's head against the rules of one server.

`AccessRules` are the rules of daemons and engines. A server with other tokens has its own rules, which start
with these.

The checks, in order: requests made by a web page are refused (`Origin`, `Sec-Fetch-Site`); /livez and /readyz
are open to everyone; `Host` must have a known name, because a page whose name was made to resolve to this
machine (DNS rebinding) sends its own name; a bearer token is needed if the server has a list of tokens.
`Content-Type` is not checked: a page cannot hide its `Origin`, and `curl -d` needs no option.
"""

from __future__ import annotations

import hmac
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

from areal_like.security.keys import KeyRole

MAX_HEAD_BYTES = 64 << 10
"""Maximum bytes of a request's headers."""
PROBE_PATHS = frozenset({"/livez", "/readyz"})
"""Paths that need neither token nor known host: they say only `ok` or `not ready`."""
_BY_NAME = "headers_by_name"
"""Name in `scope["state"]`: see `headers_by_name`."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_SAFE_METHODS = ("GET", "HEAD")

RoleOfToken = Callable[[str], KeyRole | None]
"""The role of a bearer token; None if the token is unknown, revoked or expired."""
HeadersByName = dict[bytes, bytes | None]
"""None: the header is repeated."""


class Reason(StrEnum):
    """Why a request was refused: the label of the metric `areal_http_refused_total`."""

    ORIGIN = "origin"
    """The request was made by a web page."""
    HOST = "host"
    """The request's `Host` header has a name that this server does not have."""
    TOKEN = "token"
    """The request has no valid bearer token."""
    ROLE = "role"
    """The request's token permits no changes."""
    HEAD = "head"
    """The request's headers are too long."""
    BODY = "body"
    """The request's body is too long."""
    SLOW = "slow"
    """The request's body did not arrive in time."""
    GONE = "gone"
    """The request is for a session that has ended."""
    BUSY = "busy"
    """Too many requests of the session are in progress."""
    STARTING = "starting"
    """The server has just started, and cannot check the keys of other servers' sessions yet."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused, and the HTTP status of the refusal."""

    status: int
    """HTTP status."""
    reason: Reason
    message: str
    """One sentence for the user, without line break."""


class Rules(Protocol):
    """The check that a server makes before it reads a body."""

    def refusal(self, scope: Mapping[str, Any]) -> Refusal | None:
        """Checks the head of a request, an ASGI scope; None if the request is accepted."""


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Who may use one HTTP server."""

    hosts: frozenset[str]
    """Names, in lower case, that requests may have in their Host header."""
    role_of: RoleOfToken | None = None
    """None: no token is needed. The role OPERATOR may do everything, AGENT and SCORER nothing; others may
    read."""
    open_paths: frozenset[str] = PROBE_PATHS

    def refusal(self, scope: Mapping[str, Any]) -> Refusal | None:
        """Checks the head of a request; None if its body may be read."""
        if sum(map(len, chain.from_iterable(scope["headers"]))) > MAX_HEAD_BYTES:
            return Refusal(431, Reason.HEAD, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        headers = headers_by_name(scope)
        site = headers.get(b"sec-fetch-site", b"none")
        if b"origin" in headers or site not in (b"none", b"same-origin"):
            return Refusal(403, Reason.ORIGIN, "requests from web pages are refused (Origin, Sec-Fetch-Site)")
        if scope["path"] in self.open_paths and scope["method"] in _SAFE_METHODS:
            return None
        host = host_of(headers.get(b"host") or b"")
        # A numeric address cannot be rebound: the one at which the request arrived is always accepted.
        if host not in self.hosts and host != (scope.get("server") or ("",))[0]:
            return Refusal(
                421, Reason.HOST, "the Host header names another host: add it to security.allowed_hosts"
            )
        return None if self.role_of is None else self._token_refusal(headers, scope["method"])

    def _token_refusal(self, headers: HeadersByName, method: str) -> Refusal | None:
        assert self.role_of is not None
        role = self.role_of(bearer_token(headers))
        # Tokens for sessions and scores are unknown here: they permit nothing on this server.
        if role in (None, KeyRole.AGENT, KeyRole.SCORER):
            return Refusal(401, Reason.TOKEN, "this needs a valid token: Authorization: Bearer TOKEN")
        if role is not KeyRole.OPERATOR and method not in _SAFE_METHODS:
            return Refusal(
                403, Reason.ROLE, f"a token of role {role.value} may read only; use operator.token"
            )
        return None


def headers_by_name(scope: Mapping[str, Any]) -> HeadersByName:
    """A request's headers; None is the value of one that is repeated. Computed once for each request."""
    state: dict[str, Any] = scope.get("state", {})
    found: HeadersByName | None = state.get(_BY_NAME)
    if found is None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        found = state[_BY_NAME] = dict(headers)
        if len(found) < len(headers):
            counts = Counter(name for name, _ in headers)
            found |= {name: None for name, count in counts.items() if count > 1}
    return found


def bearer_token(headers: HeadersByName) -> str:
    """The token of a request; empty if it has none, or more than one."""
    scheme, _, token = (headers.get(b"authorization") or b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def header_key(headers: HeadersByName, name: bytes) -> str:
    """The key in a header of its own, such as `x-api-key`; empty if there is none, or more than one."""
    return (headers.get(name) or b"").decode("latin-1").strip()


def single_key(key: str) -> RoleOfToken:
    """The token rule of an engine: one key permits everything."""
    return lambda token: KeyRole.OPERATOR if hmac.compare_digest(token.encode(), key.encode()) else None


def host_names(bound: str, *, others: Iterable[str] = ()) -> frozenset[str]:
    """The names of a server that binds the address `bound`: that address, `others`, and those of loopback.

    A server that binds every address has this machine's name as well.
    """
    names = {bound, *others, *_LOCAL_NAMES}
    if bound in ("0.0.0.0", "::"):
        names |= {socket.gethostname(), socket.gethostname().partition(".")[0]}
    return frozenset(name.lower() for name in names if name)


@lru_cache(maxsize=64)
def host_of(header: bytes) -> str:
    """The name in a Host header, in lower case and without port and brackets; empty if there is none."""
    text = header.decode("latin-1").strip().lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
