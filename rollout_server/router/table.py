"""Where a router sends a request: its servers, its sessions, and the way of one request. Pure.

    RoutingTable    the servers (from the buffers' lists, and from what became of requests), session -> server
    ClaimWay        one claim:              next() -> Ask | Pause | Stop -> none, failed or done -> next() ...
    SessionWay      a session's request:    next() -> Ask | Pause | Stop -> elsewhere, moved, failed, done ...

    server: listed -> in use -> (a request fails) -> avoided for a moment -> in use
              `-> not heard by any buffer for a lease's time -> lost: its requests go elsewhere -> dropped

A claim goes to a server that has waiting sessions according to its last heartbeat, and waits at the one with
the fewest claims otherwise. A session's request goes to the server that has it. If that one is not known or
does not respond, any other says where the session is, because every server of a run can check its key.
Whoever has no right to a session hears so from a server: the table has no keys, only digests of those that a
server has accepted, by which the router decides whose bodies get memory first (places.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

MAX_SESSIONS = 100_000
"""Sessions whose server is remembered; the server of others is asked for."""
MAX_CLAIMS = 1024
"""Claims that may wait at the same time."""
LONG_WAIT_S, SHORT_WAIT_S = 10.0, 2.0
"""Longest wait of a claim at one server: with a claim at each server, and with fewer claims than that."""
_BLIND_VISITS = 4
"""Servers that a claim without waiting time asks although they seem to have no session."""
_AVOID_S, _LONGEST_AVOID_S = 0.5, 4.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0
_FREE_HOPS = 3
"""Times that a request follows a server's word about its session before it pauses each time."""


class Retry(StrEnum):
    """Why a request is sent again: a label of `areal_router_retries_total`."""

    ELSEWHERE = "elsewhere"
    """The server says that another one has the session."""
    MOVED = "moved"
    """The session waits for a server."""
    GONE = "gone"
    """A server that is not known to have the session says that it is over: the others are asked, too."""
    UNREACHABLE = "unreachable"
    """The server could not be reached, or the connection broke without a response."""
    LOST = "lost"
    """No buffer hears from the server any more, and the request was still there."""
    NONE = "none"
    """A claim: no session waits at the server."""


class Stop(StrEnum):
    """Why a request is given up."""

    NONE_WAITS = "none_waits"
    """A claim: no session waited in time."""
    NO_SERVER = "no_server"
    """No server could be reached in time."""
    NOT_CONTINUED = "not_continued"
    """No server continued the session in time."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A rollout server in the list of a buffer."""

    name: str
    url: str
    """Of its sessions, without a slash at the end."""
    silent_s: float
    """Seconds since the buffer heard from it."""
    num_waiting: int = 0
    """Sessions that wait for an agent."""


@dataclass(eq=False, kw_only=True)
class Server:
    """A rollout server as the router knows it."""

    name: str
    url: str
    heard_s: float
    """When a buffer last heard from it."""
    num_waiting: int = 0
    num_claims: int = 0
    """Claims of this router that it has now."""
    num_failures: int = 0
    """Requests in a row that it did not respond to."""
    avoided_until_s: float = -math.inf
    is_lost: bool = False


@dataclass(frozen=True)
class Ask:
    """Send the request to this server."""

    server: Server
    url: str
    """Of its sessions at this moment."""
    wait_s: float = 0.0
    """A claim: how long it may wait there."""


@dataclass(frozen=True)
class Pause:
    """Ask for the next step after this many seconds."""

    seconds: float


Step = Ask | Pause | Stop


@dataclass(frozen=True)
class Session:
    """A session and its server."""

    server: str
    key_digest: bytes
    """Of a key that a server has accepted."""


class RoutingTable:
    """The servers and sessions of one run. Times are seconds on any monotonic clock."""

    def __init__(self, *, lease_timeout_s: float, max_sessions: int = MAX_SESSIONS) -> None:
        """`lease_timeout_s`: after this time without a heartbeat the buffers give a server's sessions to
        others."""
        self._lease_timeout_s, self._max_sessions = lease_timeout_s, max_sessions
        self.servers: dict[str, Server] = {}
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        """By id; the one that was learned first comes first."""
        self.num_claims = 0
        self._turn = 0

    def see(self, listed: Iterable[Listed], *, now_s: float) -> list[Server]:
        """Takes over what the buffers say; returns servers that are lost from now on.

        A server that is in no list any more is kept for a lease's time: it may be ending, or its buffer has
        just started again.
        """
        newest: dict[str, Listed] = {}
        for one in listed:
            if one.name not in newest or one.silent_s < newest[one.name].silent_s:
                newest[one.name] = one
        for name, one in newest.items():
            server = self.servers.get(name)
            if server is None or server.url != one.url:  # another process; the old one's claims are its own
                server = Server(name=name, url=one.url, heard_s=now_s - one.silent_s)
                self.servers[name] = server
            server.heard_s = max(server.heard_s, now_s - one.silent_s)
            server.num_waiting = one.num_waiting
        lost = []
        for server in list(self.servers.values()):
            was_lost, server.is_lost = server.is_lost, now_s - server.heard_s > self._lease_timeout_s
            if server.is_lost and server.name not in newest:
                del self.servers[server.name]
            if server.is_lost and not was_lost:
                lost.append(server)
        return lost

    def available(self, *, now_s: float) -> list[Server]:
        """Servers that may be asked now, beginning with another one each time."""
        found = [one for one in self.servers.values() if not one.is_lost and one.avoided_until_s <= now_s]
        self._turn += 1
        first = self._turn % len(found) if found else 0
        return found[first:] + found[:first]

    def server_at(self, url: str) -> Server | None:
        """The server whose sessions are at this URL; None if no buffer has named it."""
        return next((one for one in self.servers.values() if one.url == url), None)

    def failed(self, server: Server, *, now_s: float) -> None:
        """Records that a request had no response: the server is avoided for a moment."""
        server.num_failures += 1
        server.num_waiting = 0
        avoid_s = min(_LONGEST_AVOID_S, _AVOID_S * 2.0 ** min(server.num_failures - 1, 10))
        server.avoided_until_s = now_s + avoid_s

    def responded(self, server: Server) -> None:
        """Records that a server has responded, whatever the response was."""
        server.num_failures, server.avoided_until_s = 0, -math.inf

    def learn(self, id: str, server: Server, key_digest: bytes) -> None:
        """Records that a server has a session, and the digest of a key that it has accepted for it."""
        self.sessions[id] = Session(server.name, key_digest)
        self.sessions.move_to_end(id)
        if len(self.sessions) > self._max_sessions:
            self.sessions.popitem(last=False)

    def forget(self, id: str) -> None:
        """Records that a session is over."""
        self.sessions.pop(id, None)

    def is_known(self, id: str, key_digest: bytes) -> bool:
        """True if a server has accepted this key for this session."""
        session = self.sessions.get(id)
        return session is not None and session.key_digest == key_digest


@dataclass(eq=False, kw_only=True)
class ClaimWay:
    """The way of one claim. After each `Ask` call one of `none`, `failed` and `done`, then `next` again."""

    table: RoutingTable
    end_s: float
    """When the agent wants to hear that no session waits."""
    _asked: Server | None = None
    """Has the claim now."""
    _last: Server | None = None
    _visited: set[str] = field(default_factory=set)
    """Servers that had none, since any of them was expected to have one."""

    def __post_init__(self) -> None:
        self.table.num_claims += 1

    def next(self, *, now_s: float) -> Step:
        """What to do now."""
        assert self._asked is None
        left_s = self.end_s - now_s
        servers = self.table.available(now_s=now_s)
        if not servers:
            return Stop.NO_SERVER if left_s <= 0 else Pause(min(left_s, _LONGEST_PAUSE_S))
        fewest = sorted(servers, key=lambda one: one.num_claims)
        for server in fewest:
            if server.num_waiting > server.num_claims and server.name not in self._visited:
                return self._ask(server, wait_s=0.0)
        if left_s <= 0:
            unvisited = [one for one in fewest if one.name not in self._visited]
            if unvisited and len(self._visited) < _BLIND_VISITS:
                return self._ask(unvisited[0], wait_s=0.0)
            return Stop.NONE_WAITS
        self._visited.clear()
        others = [one for one in fewest if one is not self._last] or fewest
        wait_s = left_s if len(servers) == 1 else SHORT_WAIT_S
        if self.table.num_claims >= len(servers) > 1:
            wait_s = LONG_WAIT_S
        return self._ask(others[0], wait_s=min(left_s, wait_s))

    def none(self) -> None:
        """The server has no session."""
        server = self._free()
        server.num_waiting = 0
        self._visited.add(server.name)
        self.table.responded(server)

    def failed(self, *, now_s: float) -> None:
        """The server has not responded."""
        self.table.failed(self._free(), now_s=now_s)

    def done(self) -> None:
        """The server's response is the agent's."""
        self.table.responded(self._free())

    def claimed(self, *, num_sessions: int) -> None:
        """The response has so many sessions; call it before `done`."""
        assert self._asked is not None
        self._asked.num_waiting = max(0, self._asked.num_waiting - num_sessions)

    def close(self) -> None:
        """The claim is over, whatever became of it."""
        if self._asked is not None:
            self._free()
        self.table.num_claims -= 1

    def _ask(self, server: Server, *, wait_s: float) -> Ask:
        server.num_claims += 1
        self._asked = self._last = server
        return Ask(server, server.url, wait_s)

    def _free(self) -> Server:
        assert self._asked is not None
        server, self._asked = self._asked, None
        server.num_claims -= 1
        return server


@dataclass(eq=False, kw_only=True)
class SessionWay:
    """The way of one request of a session. After each `Ask` call one of `elsewhere`, `moved`, `gone`,
    `failed` and `done`, then `next` again."""

    table: RoutingTable
    id: str
    limit_s: float
    """Longest time to look for the server that continues the session."""
    is_repetition: bool = field(default=False, init=False)
    """True if a server may have received the request already: it is then sent again as a repetition, so that
    a turn that was sampled is not sampled again."""
    _asked: Server | None = field(default=None, init=False)
    """The server that was asked last."""
    _asked_s: float = field(default=-math.inf, init=False)
    _at: Server | None = field(default=None, init=False)
    """The server that has the session, by another one's word."""
    _end_s: float = field(default=math.inf, init=False)
    """When the client hears that no server continues its session; infinite while all is well."""
    _must_pause: bool = field(default=False, init=False)
    _said_gone: set[str] = field(default_factory=set, init=False)
    """Servers that say that the session is over."""
    _num_pauses: int = field(default=0, init=False)
    _num_hops: int = field(default=0, init=False)

    def next(self, *, now_s: float) -> Step:
        """What to do now."""
        if not self._must_pause and (server := self._choice(now_s=now_s)) is not None:
            self._asked, self._asked_s = server, now_s
            return Ask(server, server.url)
        self._trouble(now_s=now_s)
        self._must_pause = False
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._num_pauses, 10))
        self._num_pauses += 1
        if now_s + pause_s <= self._end_s:
            return Pause(pause_s)
        return Stop.NO_SERVER if self._asked is None else Stop.NOT_CONTINUED

    def elsewhere(self, url: str, *, now_s: float) -> None:
        """The server says that the one at `url` has the session. Followed only to a server that a buffer has
        named."""
        asked = self._heard(now_s=now_s)
        at = self._at = self.table.server_at(url)
        self._num_hops += 1
        is_dead = at is None or at is asked or at.is_lost or at.avoided_until_s > now_s
        self._must_pause = is_dead or self._num_hops > _FREE_HOPS

    def moved(self, *, now_s: float) -> None:
        """The server says that the session waits for a server."""
        self._heard(now_s=now_s)
        self._at, self.is_repetition, self._must_pause = None, True, True

    def gone(self, *, now_s: float) -> bool:
        """The server says that the session is over. Returns True if another server is to be asked.

        The word of the server that has the session counts. Others know only of sessions with a journal, and
        one without is lost with its server but not before.
        """
        asked = self._heard(now_s=now_s)
        known = self.table.sessions.get(self.id)
        if known is not None and known.server == asked.name:
            return False
        self._said_gone.add(asked.name)
        self._at = None
        return any(one.name not in self._said_gone for one in self.table.available(now_s=now_s))

    def failed(self, *, is_sent: bool, now_s: float) -> None:
        """There was no response. `is_sent`: False if the server cannot have received the request."""
        assert self._asked is not None
        self._trouble(now_s=now_s)
        self.table.failed(self._asked, now_s=now_s)
        self._at = None
        self.is_repetition |= is_sent

    def done(self) -> None:
        """The response is the client's."""
        assert self._asked is not None
        self.table.responded(self._asked)

    def _heard(self, *, now_s: float) -> Server:
        assert self._asked is not None
        self._trouble(now_s=now_s)
        self.table.responded(self._asked)
        return self._asked

    def _trouble(self, *, now_s: float) -> None:
        """Begins the time of the search, unless it has begun. (The response of a server that has sampled for
        long is a new beginning.)"""
        if self._end_s == math.inf or now_s - self._asked_s > self.limit_s:
            self._end_s = now_s + self.limit_s
            self._num_pauses = self._num_hops = 0

    def _choice(self, *, now_s: float) -> Server | None:
        """The server that has the session, if that is known and it responds, or else any other."""
        holder = self._at
        if holder is None and (session := self.table.sessions.get(self.id)) is not None:
            known = self.table.servers.get(session.server)
            holder = known if known is not self._asked else None  # it has just said something else
        if holder is not None and not holder.is_lost and holder.avoided_until_s <= now_s:
            return holder
        servers = self.table.available(now_s=now_s)
        servers = [one for one in servers if one.name not in self._said_gone] or servers
        others = (one for one in servers if one is not self._asked)
        return next(others, servers[0] if servers else None)
