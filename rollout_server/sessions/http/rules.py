"""Access rules for the sessions of a rollout server, applied before a body is read.

    /sessions           a token of the job, of role `agent` or `operator`; without keys everybody
    /sessions/ID/...    the key of this session; 410 if it has ended, except for a repeated end
    everything else     as /sessions, and then 404

A wrong key and an unknown id get the same response, 401, so that a client without a key cannot learn ids or
the state of sessions. The key of an external agent's session is valid at every server of the run
(`areal_like.security.session_keys`): one that does not have the session says where it is (elsewhere.py).
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.errors import SessionGoneError
from areal_like.http.access import (
    AccessRules,
    Reason,
    Refusal,
    RoleOfToken,
    bearer_token,
    header_key,
    headers_by_name,
)
from areal_like.http.guard import Headers
from areal_like.security.keys import KeyRole
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.errors import MOVED, error_content, gone_code

_PROMPTS = (
    "/completions", "/generate", "/responses", "/responses/input_tokens", "/messages",
    "/messages/count_tokens",
)  # fmt: skip
"""Ends of the paths of requests that have a prompt."""
_CLAIMING_ROLES = (KeyRole.AGENT, KeyRole.OPERATOR)
_SMALL_BODY_BYTES = 1 << 16
_CODES = {Reason.TOKEN: "invalid_api_key", Reason.BUSY: "too_many_requests", Reason.STARTING: MOVED}
_SOON: Headers = [(b"retry-after", b"1")]
_RETRY: Mapping[Reason, Headers] = {Reason.SLOW: [], Reason.BUSY: _SOON, Reason.STARTING: _SOON}
"""Headers of refusals after which a request may be repeated."""
WRONG_KEY = (
    "no session of this run has this id and this key: send the api_key of the session "
    "(Authorization: Bearer API_KEY, or x-api-key)"
)
_NO_KEY = secrets.token_urlsafe(32)
"""Compared with the key in a request to an unknown session, so that the check takes the same time."""


@dataclass(frozen=True, kw_only=True)
class SessionRules:
    """The rules of one listener."""

    book: SessionBook
    hosts: frozenset[str]
    """See AccessRules."""
    role_of: RoleOfToken | None
    """Returns the role of a job's token; None without keys."""
    takes_claims: bool
    """False for the listener of the server's own agents, whose sessions are not claimed."""
    most_requests: int
    """Maximum number of concurrent requests in a session."""

    def refusal(self, scope: Mapping[str, Any]) -> Refusal | None:
        """Returns why a request is refused, given its head; None if its body may be read."""
        refusal = AccessRules(hosts=self.hosts, open_paths=frozenset()).refusal(scope)
        if refusal is not None:
            return refusal
        headers = headers_by_name(scope)
        token = bearer_token(headers)
        if not (id := session_id(scope["path"])):
            return self._claim_refusal(token)
        # Programs that use Anthropic's API send the key in one header or the other, or another key besides.
        keys = (token, header_key(headers, b"x-api-key"))
        return self._session_refusal(id, keys, is_end=str(scope["path"]).endswith("/end"))

    @contextlib.contextmanager
    def place(self, scope: Mapping[str, Any]) -> Iterator[Refusal | None]:
        """Context in which an accepted request is read and handled; yields a refusal if its session has too
        many. Otherwise a client with a single key could use all connections, and memory for as many
        bodies."""
        session = self.book.get(session_id(scope["path"]))
        if session is None:
            yield None
        elif session.num_requests >= self.most_requests:
            message = f"{session.num_requests} requests of this session are in progress: wait for one of them"
            yield Refusal(429, Reason.BUSY, message)
        else:
            session.num_requests += 1
            try:
                yield None
            finally:
                session.num_requests -= 1

    def _session_refusal(self, id: str, tokens: Sequence[str], *, is_end: bool) -> Refusal | None:
        key = self.book.key_of(id)
        wanted_key = (key or _NO_KEY).encode()
        is_key = any(hmac.compare_digest(token.encode(), wanted_key) for token in tokens)
        if not key and self.takes_claims and any(self.book.keys.is_key(id, token) for token in tokens):
            return None  # another server has the session, or had it
        if not key and self.takes_claims and not self.book.keys.are_known:
            message = "the server has just started, and does not know yet where sessions are: ask again"
            return Refusal(503, Reason.STARTING, message)
        if not (is_key and key):
            wanted = WRONG_KEY
            role_of = self.role_of
            if role_of is not None and any(role_of(token) is not None for token in tokens):
                wanted += "; a token of the job opens no session"
            return Refusal(401, Reason.TOKEN, wanted)
        try:
            self.book.find(id)
        except SessionGoneError as gone:
            if not (is_end and self.book.end_answer(id)):
                return Refusal(410, Reason.GONE, str(gone))
        return None

    def _claim_refusal(self, token: str) -> Refusal | None:
        if not self.takes_claims:
            return Refusal(403, Reason.ROLE, "this listener is for the server's own agents: no claims here")
        return claim_refusal(token, self.role_of)


def claim_refusal(token: str, role_of: RoleOfToken | None) -> Refusal | None:
    """Why a claim with this bearer token is refused; None if it is not. `role_of`: None without keys."""
    if role_of is None:
        return None
    role = role_of(token)
    if role is None:
        return Refusal(
            401,
            Reason.TOKEN,
            "claims need a valid token of role agent (agent.token): Authorization: Bearer TOKEN",
        )
    if role not in _CLAIMING_ROLES:
        return Refusal(
            403, Reason.ROLE, f"a token of role {role.value} may claim no session; use agent.token"
        )
    return None


def most_bytes_of_body(scope: Mapping[str, Any], *, of_prompts: int) -> int:
    """Returns the maximum body size of a request: `of_prompts` for requests to the model, a small one for
    others."""
    has_prompt = str(scope["path"]).endswith(_PROMPTS)
    return of_prompts if has_prompt else min(of_prompts, _SMALL_BODY_BYTES)


def error_of_refusal(refusal: Refusal, scope: Mapping[str, Any]) -> tuple[bytes, Headers]:
    """Returns a refusal's body in the format of the client's API, and its headers."""
    code = gone_code(refusal.message) if refusal.reason is Reason.GONE else _CODES.get(refusal.reason)
    content = error_content(scope["path"], refusal.status, refusal.message, code=code)
    return content, _RETRY.get(refusal.reason, [(b"x-should-retry", b"false")])


def session_id(path: str) -> str:
    """Returns ID of /sessions/ID/...; empty for other paths."""
    parts = path.split("/", 3)
    return parts[2] if len(parts) == 4 and parts[:2] == ["", "sessions"] else ""
