"""The sessions of one rollout server: found by id, claimed by external agents. Pure.

add -> (waiting: claimed in the order of the leases) -> remove -> remembered as gone for a while
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import StrEnum

from areal_like.errors import SessionGoneError
from rollout_server.sessions.claimants import Claimants
from rollout_server.sessions.open_session import OpenSession, SessionState

_MAX_REMEMBERED = 10_000
"""Sessions that have gone, whose clients are told why."""
WRONG_ROUTES = ("responses", "messages", "embeddings", "other")
"""Last words of the routes of other APIs, which clients try to find out whether this server has them."""
_MAX_ROUTE_CHARS = 60
_LONG_S = 1.0
"""Waits that take longer are named in the server's status."""


class SessionOutcome(StrEnum):
    """How a session has ended."""

    ENDED = "ended"
    TRUNCATED = "truncated"
    """By a budget or the time limit of the sample."""
    IDLE = "idle"
    """It had no request for too long."""
    FAILED = "failed"
    """Its agent failed, or made no request."""
    ENGINE = "engine"
    """The engine failed."""
    CANCELLED = "cancelled"
    """Its lease was cancelled."""


class SessionBook:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self.url = ""
        """Where this machine reaches the sessions (`http://host:port`), when they are served."""
        self._sessions: dict[str, OpenSession] = {}
        """In the order of their leases: the samples that the trainer needs first are first."""
        self.on_waiting: Callable[[], None] = lambda: None
        """Called when a session can be claimed, or none will be any more."""
        self.is_closed = False
        """True once no more sessions are given out."""
        self._gone: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Why, and the session's key, by id."""
        self.num_ended = Counter[SessionOutcome]()
        self.num_refused = Counter[int]()
        """Requests of clients that were refused, by HTTP status."""
        self.num_ignored = Counter[str]()
        """Fields of requests that had no effect."""
        self.claimants = Claimants()
        """How the sessions of external agents end, and who gets no more for now."""
        self.num_wrong_routes = Counter[str]()
        """Requests of sessions for routes that do not exist, by the names of `WRONG_ROUTES`."""
        self._calls_of_gone = 0
        self._progress_of_gone = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Sessions that an agent can claim."""
        return sum(map(_is_free, self._sessions.values()))

    @property
    def open(self) -> list[OpenSession]:
        """Sessions that agents work on."""
        return [one for one in self._sessions.values() if one.state is SessionState.OPEN]

    def close(self) -> None:
        """Gives out no more sessions; clients that wait for one are told so at once."""
        self.is_closed = True
        self.on_waiting()

    def add(self, session: OpenSession) -> None:
        """A new session."""
        self._sessions[session.id] = session
        if session.state is SessionState.WAITING:
            self.on_waiting()

    @property
    def num_calls(self) -> int:
        """Requests to the model, of all sessions so far."""
        return self._calls_of_gone + sum(one.num_calls for one in self._sessions.values())

    @property
    def progress(self) -> tuple[int, int, int]:
        """Changes when a session is claimed or ends, and when a request is answered or an agent is heard."""
        living = self._sessions.values()
        progress = self._progress_of_gone + sum(one.num_served + one.num_heard for one in living)
        return progress, len(self.open), self.num_ended.total()

    @property
    def num_pending(self) -> int:
        """Those that are not answered yet."""
        return sum(one.num_pending for one in self._sessions.values())

    def waits(self) -> dict[str, float]:
        """What sessions wait for -> seconds of the longest wait, for a server's status."""
        waiting = [one for one in self._sessions.values() if one.state is SessionState.WAITING]
        longest_s = max((one.idle_s for one in waiting), default=0.0)
        found = {f"sessions: {len(waiting)} wait for an agent (POST /sessions)": longest_s}
        if waiting:
            troubles = self.claimants.troubles(now_s=waiting[0].now_s)
            found |= {
                f"sessions: {trouble}": min(seconds, longest_s) for trouble, seconds in troubles.items()
            }
        if opened := self.open:
            idle = max(opened, key=lambda one: one.idle_s)
            found[f"sessions: the next request to {idle.id}, of {len(opened)} open"] = idle.idle_s
        return {name: round(seconds, 3) for name, seconds in found.items() if seconds >= _LONG_S}

    def remove(
        self, session: OpenSession, outcome: SessionOutcome = SessionOutcome.ENDED, problem: str = ""
    ) -> bool:
        """Its sample is finished or not wanted any more; clients are told `session.reason`.

        `problem`: why its agent has not made the sample, for outcomes IDLE and FAILED. True if that may be
        for the sample: the agent has made the one before.
        """
        session.close(session.reason or f"the session {session.id} has ended")
        if self._sessions.pop(session.id, None) is not None:
            self.num_ended[outcome] += 1
            self._calls_of_gone += session.num_calls
            self._progress_of_gone += session.num_served + session.num_heard
            self._gone[session.id] = session.reason, session.api_key
            if len(self._gone) > _MAX_REMEMBERED:
                self._gone.popitem(last=False)
            return self._judge(session, outcome, problem)
        return True

    def _judge(self, session: OpenSession, outcome: SessionOutcome, problem: str) -> bool:
        claimant = session.claimant
        if claimant is None:
            return True
        if outcome in (SessionOutcome.IDLE, SessionOutcome.FAILED):
            now_s, claimed_s = session.now_s, session.claimed_s
            return self.claimants.fail(claimant, problem, claimed_s=claimed_s, now_s=now_s)
        if outcome in (SessionOutcome.ENDED, SessionOutcome.TRUNCATED):
            self.claimants.deliver(claimant)
        return True

    def note_wrong_route(self, id: str, request: str) -> None:
        """A session's client asked for a route that does not exist; `request`: `POST /v1/responses`."""
        name = request.rpartition("/")[2]
        self.num_wrong_routes[name if name in WRONG_ROUTES else "other"] += 1
        if (session := self._sessions.get(id)) is not None:
            shown = (one if one.isprintable() else "?" for one in request[:_MAX_ROUTE_CHARS])  # it is logged
            session.refused_route = "".join(shown)

    def find(self, id: str) -> OpenSession | None:
        """None if there was none. Raises SessionGoneError if there was one."""
        if (gone := self._gone.get(id)) is not None:
            raise SessionGoneError(gone[0])
        return self._sessions.get(id)

    def key_of(self, id: str) -> str:
        """The key that requests of a session need, also of one that has gone; empty if there was none."""
        if (session := self._sessions.get(id)) is not None:
            return session.api_key
        return self._gone[id][1] if id in self._gone else ""

    def offer(self) -> OpenSession | None:
        """The next session for an external agent, offered to it; None if there is none.

        It is claimed once the agent has the answer. Until then it is offered to nobody else.
        """
        for session in () if self.is_closed else self._sessions.values():
            if _is_free(session):
                session.is_offered = True
                return session
        return None

    def take_back(self, session: OpenSession) -> None:
        """After an offer: it waits again if it was not claimed. Its key is another one then, as the client
        may have read the first one without the rest of the answer."""
        session.is_offered = False
        if session.state is SessionState.WAITING:
            session.api_key = secrets.token_urlsafe(32)
            self.on_waiting()

    def claim(self) -> OpenSession | None:
        """The next session for an external agent, claimed at once; None if there is none."""
        session = self.offer()
        if session is not None:
            session.claim()
        return session


def _is_free(session: OpenSession) -> bool:
    return session.state is SessionState.WAITING and not session.is_offered
