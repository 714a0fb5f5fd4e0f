"""The sessions of one rollout server: found by id, claimed by external agents. Pure.

add -> (waiting: claimed in the order of the leases) -> remove -> remembered as gone for a while
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from areal_like.errors import SessionGoneError
from areal_like.security.session_keys import SessionKeys
from rollout_server.sessions.claimants import Claimants
from rollout_server.sessions.journal import JournalCounts
from rollout_server.sessions.open_session import AskedLimits, OpenSession, SessionOutcome, SessionState

JOB_OVER = "the job has ended: there is nothing left to claim"
"""Message to clients of a finished run; its error code is `job_over`."""
SERVER_ENDS = (
    "the server is ending, and the sample is made elsewhere: claim another session, at another server or at "
    "this one after it has restarted"
)
"""Message to clients whose session ends with its server."""

OVER = (
    "the session is over: its sample is finished or no longer needed, or it could not be continued when its "
    "server died: claim another session"
)
"""Message to clients of a session that this server never had."""
_MAX_REMEMBERED = 10_000
"""Number of gone sessions that are remembered, so that their clients are told why."""
WRONG_ROUTES = ("conversations", "batches", "embeddings", "other")
"""Last path components of other APIs' routes, which clients try in order to find out what this server
supports."""
_MAX_ROUTE_CHARS = 60
_AGENT_STARTS_PER_CORE = 2
_LONG_S = 1.0
"""Longer waits are listed in the server's status."""


class _Gone(NamedTuple):
    """What is remembered of a session that has gone."""

    reason: str
    api_key: str
    end_answer: Mapping[str, Any] | None = None
    """See `OpenSession`."""


class SessionBook:
    """All sessions of one server. Belongs to one event loop."""

    def __init__(self) -> None:
        self.keys = SessionKeys()
        self.journals = JournalCounts()
        self.url = ""
        """URL of the sessions on this machine (`http://host:port`), once they are served."""
        self._sessions: dict[str, OpenSession] = {}
        """In the order of their leases, so that the samples that the trainer needs first come first."""
        self.on_waiting: Callable[[], None] = lambda: None
        """Called when a session can be claimed, or when none will be offered any more."""
        self.is_closed = False
        """True once no more sessions are offered."""
        self.is_job_over = False
        """True once the run is finished."""
        self._gone: OrderedDict[str, _Gone] = OrderedDict()
        """By id."""
        self.num_ended = Counter[SessionOutcome]()
        self.num_refused = Counter[int]()
        """Number of refused client requests, by HTTP status."""
        self.num_ignored = Counter[str]()
        """Number of request fields that had no effect."""
        self.claimants = Claimants()
        """How the sessions of external agents end, and which claimants get none for now."""
        self.num_wrong_routes = Counter[str]()
        """Number of session requests for routes that do not exist, by name in `WRONG_ROUTES`."""
        self._untold: dict[str, list[OpenSession]] = {}
        """Sessions that were open at the end of the job and whose agents have not been told: id -> those that
        were claimed together."""
        self._forgetting: set[asyncio.Task[None]] = set()
        """Journals of claims that were taken back are being deleted; a new claim waits for that."""
        self.agent_starts = asyncio.Semaphore(_AGENT_STARTS_PER_CORE * len(os.sched_getaffinity(0)))
        """Held by an agent of the task until its first request: an agent imports its client's modules, and if
        hundreds do so at once, all of them come late."""
        self._calls_of_gone = 0
        self._progress_of_gone = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Number of sessions that an agent can claim."""
        return sum(map(_is_free, self._sessions.values()))

    @property
    def open(self) -> list[OpenSession]:
        """The sessions that agents are working on."""
        return [one for one in self._sessions.values() if one.state is SessionState.OPEN]

    def close(self, *, is_job_over: bool = False) -> None:
        """Stops offering sessions; clients that wait for one are told so at once.

        `is_job_over`: True if the run is finished. May be called again.
        """
        self.is_closed = True
        self.is_job_over = self.is_job_over or is_job_over
        self.on_waiting()

    @property
    def num_untold(self) -> int:
        """Number of sessions of external agents that were open when the job ended, and have not been told
        so by a response."""
        return len(self._untold)

    def add(self, session: OpenSession) -> None:
        self._sessions[session.id] = session
        self._gone.pop(session.id, None)  # it may have come back to this server
        if session.claim_id:
            self._join(session)
        if session.state is SessionState.WAITING:
            self.on_waiting()

    def _join(self, session: OpenSession) -> None:
        """Puts a restored session together with those that were claimed with it."""
        for other in self._sessions.values():
            if other is not session and other.claim_id == session.claim_id:
                session.members = other.members
                session.members.append(session)
                return

    @property
    def num_calls(self) -> int:
        """Number of requests to the model in all sessions so far."""
        return self._calls_of_gone + sum(one.num_calls for one in self._sessions.values())

    @property
    def progress(self) -> tuple[int, int, int]:
        """Changes when a session is claimed or ends, a request is served, or an agent sends a heartbeat."""
        living = self._sessions.values()
        progress = self._progress_of_gone + sum(one.num_served + one.num_heard for one in living)
        return progress, len(self.open), self.num_ended.total()

    @property
    def num_pending(self) -> int:
        return sum(one.num_pending for one in self._sessions.values())

    @property
    def num_kept_bytes(self) -> int:
        """Size of the responses that later requests may refer to."""
        return sum(one.kept.num_bytes for one in self._sessions.values())

    def waits(self) -> dict[str, float]:
        """Returns what sessions wait for -> seconds of the longest wait, for a server's status."""
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
        """Removes a session whose sample is finished or no longer needed; clients are told `session.reason`.

        `problem`: why its agent did not make the sample, for outcomes IDLE and FAILED. Returns True if the
        sample itself may be the cause, because the agent made its previous one. A session that ended well is
        followed by `credit`, or by `spoil`.
        """
        session.close(session.gone)
        if self._sessions.pop(session.id, None) is not None:
            self.num_ended[outcome] += 1
            self._calls_of_gone += session.num_calls
            self._progress_of_gone += session.num_served + session.num_heard
            if not session.moves:  # else the buffers know where it is
                self._remember(session.id, _Gone(session.reason, session.api_key, session.end_answer))
            if session.reason == JOB_OVER and session.was_cut and not session.num_requests:
                self._untold[session.id] = session.members
            session.outcome = outcome
            if not outcome.is_good:
                session.lost = problem or session.problem_of_engine or session.reason
                return self._judge(session)
        return True

    def credit(self, session: OpenSession) -> None:
        """Records that the agent of a removed session has done its part, unless its outcome was another one.
        It has, too, if the task's own reward fails."""
        if session.outcome is not None and session.outcome.is_good:
            session.is_credited = True
            self._deliver(session)

    def spoil(self, session: OpenSession, problem: str) -> bool:
        """Records that a removed session ended well, but what its agent posted makes it unusable. Returns as
        `remove`."""
        session.outcome, session.lost = SessionOutcome.FAILED, problem
        return self._judge(session)

    def _judge(self, session: OpenSession) -> bool:
        claimant = session.claimant
        if claimant is not None and session.outcome in (SessionOutcome.IDLE, SessionOutcome.FAILED):
            now_s, claimed_s = session.now_s, session.claimed_s
            return self.claimants.fail(claimant, session.lost, claimed_s=claimed_s, now_s=now_s)
        self._deliver(session)  # the others of its claim may now be at least half of those that count
        return True

    def _deliver(self, session: OpenSession) -> None:
        """Credits the claimant of a session, unless most sessions of the same claim have made no sample: one
        good sample of a group must not hide that the others fail."""
        counted = [one for one in session.members if not _is_of_server(one)]
        num_good = sum(one.is_credited for one in counted)
        if session.claimant is not None and num_good and 2 * num_good >= len(counted):
            self.claimants.deliver(session.claimant)

    def note_wrong_route(self, id: str, request: str) -> None:
        """Records a client's request for a route that does not exist; `request`: `POST /v1/embeddings`."""
        name = request.rpartition("/")[2]
        self.num_wrong_routes[name if name in WRONG_ROUTES else "other"] += 1
        if (session := self._sessions.get(id)) is not None:
            shown = (one if one.isprintable() else "?" for one in request[:_MAX_ROUTE_CHARS])  # it is logged
            session.refused_route = "".join(shown)

    def is_elsewhere(self, id: str) -> bool:
        """True for a session that this server does not have, or has lost to another one."""
        session = self._sessions.get(id)
        return session.is_elsewhere if session is not None else id not in self._gone

    def note_over(self, id: str, api_key: str) -> None:
        """Records that a session of another server is over."""
        self._remember(id, _Gone(OVER, api_key))

    def _remember(self, id: str, gone: _Gone) -> None:
        self._gone[id] = gone
        if len(self._gone) > _MAX_REMEMBERED:
            self._gone.popitem(last=False)

    def get(self, id: str) -> OpenSession | None:
        """Returns a session that has not gone; None without it."""
        return self._sessions.get(id)

    def find(self, id: str) -> OpenSession | None:
        """Returns a session, or None if it never existed. Raises SessionGoneError if it has gone."""
        if (gone := self._gone.get(id)) is not None:
            for session in self._untold.pop(id, ()):  # one agent has claimed them
                self._untold.pop(session.id, None)
            raise SessionGoneError(JOB_OVER if self.is_job_over else gone.reason)
        return self._sessions.get(id)

    def end_answer(self, id: str) -> Mapping[str, Any] | None:
        """Returns the response to the end of a session by its agent; None if that has not ended it."""
        found = self._sessions.get(id) or self._gone.get(id)
        return None if found is None else found.end_answer

    def key_of(self, id: str) -> str:
        """Returns the key for requests to a session, even if it has gone; empty if it never existed."""
        if (session := self._sessions.get(id)) is not None:
            return session.api_key
        return self._gone[id].api_key if id in self._gone else ""

    def offer(self) -> OpenSession | None:
        """Offers the next session to an external agent; None if there is none.

        It is claimed once the agent has received the response. Until then it is not offered to other agents.
        """
        for session in () if self.is_closed else self._sessions.values():
            if _is_free(session):
                session.is_offered = True
                return session
        return None

    def offer_group(self) -> list[OpenSession]:
        """Offers all sessions of the next prompt that can be claimed; empty if there is none. See `offer`."""
        if (first := self.offer()) is None:
            return []
        group = [
            first,
            *(one for one in self._sessions.values() if _is_free(one) and _is_of_group(one, first)),
        ]
        for session in group:
            session.is_offered = True
            session.members = group
        return list(group)

    def take_back(self, session: OpenSession) -> None:
        """Withdraws an offer: if it was not claimed, the session waits again. It gets a new key, because the
        client may have read the old one without the rest of the response."""
        session.is_offered = False
        if session.state is SessionState.WAITING:
            session.api_key = self.keys.new_key(session.id)
            session.claim_id = ""
            session.members.remove(session)
            session.members, session.asked = [session], AskedLimits()
            if session.journal is not None:  # its first entry may be on its way
                self._forgetting = {one for one in self._forgetting if not one.done()}
                self._forgetting.add(asyncio.create_task(session.journal.forget()))
            self.on_waiting()


def _is_free(session: OpenSession) -> bool:
    return session.state is SessionState.WAITING and not session.is_offered


def _is_of_server(session: OpenSession) -> bool:
    """True if a session ended for a reason that says nothing about its agent."""
    return session.outcome in (SessionOutcome.ENGINE, SessionOutcome.CANCELLED)


def _is_of_group(session: OpenSession, other: OpenSession) -> bool:
    """True if both are samples of one prompt."""
    return (session.group, session.split, session.index) == (other.group, other.split, other.index)
