"""The sessions of one rollout server: found by id, claimed by agents from outside. Pure.

add -> (waiting: claimed in the order of the leases) -> remove -> remembered as gone for a while
"""

from __future__ import annotations

from collections import OrderedDict

from areal_like.errors import SessionGoneError
from rollout_server.sessions.open_session import OpenSession, SessionState

_MAX_REMEMBERED = 10_000
"""Sessions that have gone, whose clients are told why."""


class SessionBook:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self.url = ""
        """Where this machine reaches the sessions (`http://host:port`), when they are served."""
        self._sessions: dict[str, OpenSession] = {}
        """In the order of their leases: the samples that the trainer needs first are first."""
        self._gone: OrderedDict[str, str] = OrderedDict()
        """Why, by id."""

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Sessions that an agent can claim."""
        return sum(one.state is SessionState.WAITING for one in self._sessions.values())

    @property
    def open(self) -> list[OpenSession]:
        """Sessions that agents work on."""
        return [one for one in self._sessions.values() if one.state is SessionState.OPEN]

    def add(self, session: OpenSession) -> None:
        """A new session."""
        self._sessions[session.id] = session

    def remove(self, session: OpenSession) -> None:
        """Its sample is finished or not wanted any more; clients are told `session.reason`."""
        session.close(session.reason or f"the session {session.id} has ended")
        if self._sessions.pop(session.id, None) is not None:
            self._gone[session.id] = session.reason
            if len(self._gone) > _MAX_REMEMBERED:
                self._gone.popitem(last=False)

    def find(self, id: str) -> OpenSession | None:
        """None if there was none. Raises SessionGoneError if there was one."""
        if (reason := self._gone.get(id)) is not None:
            raise SessionGoneError(reason)
        return self._sessions.get(id)

    def claim(self) -> OpenSession | None:
        """The next session for an agent from outside; None if there is none."""
        for session in self._sessions.values():
            if session.state is SessionState.WAITING:
                session.claim()
                return session
        return None
