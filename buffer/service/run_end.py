"""The end of a finished run: how long the buffer keeps running so that it can tell every peer. Pure: no
clock.

    (the run is finished) -> has_ended(): every peer has said goodbye, or `linger_s` is over

A server that was lost recently may be restarting, and a buffer that is started for a finished run does not
know which peers are left. In both cases the buffer waits for the whole time.
"""

from __future__ import annotations

from areal_like.wire.messages.hello import Role
from buffer.service.peers import ConnectedPeers


class RunEnd:
    """Times are seconds on any one clock."""

    def __init__(self, peers: ConnectedPeers, *, linger_s: float, was_finished: bool) -> None:
        """`was_finished`: an earlier buffer served the run to its end."""
        self._peers = peers
        self._linger_s = linger_s
        self._was_finished = was_finished
        self._lost_s: dict[str, float] = {}
        self._since_s: float | None = None

    def lost(self, name: str, *, now_s: float) -> None:
        """Notes that a server stopped responding."""
        self._lost_s[name] = now_s

    def reopened(self) -> None:
        """Notes that a trainer has resumed at an earlier step."""
        self._was_finished, self._since_s = False, None

    def has_ended(self, *, now_s: float) -> bool:
        """True if the buffer of a finished run may end. Poll it from the end of the run on."""
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= self._linger_s:
            return True
        may_come_back = any(
            now_s - lost_s < self._linger_s and self._peers.named(name) is None
            for name, lost_s in self._lost_s.items()
        )
        has_peers = any(self._peers.of(role) for role in Role)
        return not (has_peers or may_come_back or self._was_finished)
