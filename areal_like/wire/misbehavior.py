"""Mutes peers that send malformed frames: after a few of them, the peer's frames are not read for a while.

    READ -> _ALLOWED bad frames -> MUTED for _MUTED_S -> READ

A daemon of another wire version gets a readable refusal for each of its first frames, and a flood of
malformed frames costs no more than receiving it. Only malformed frames count, so no daemon of this release is
muted. The clock is an argument.
"""

from __future__ import annotations

from typing import TypeVar

_Value = TypeVar("_Value", int, float)
_ALLOWED = 16
"""Malformed frames that are read before a peer is muted; those of another wire version get a refusal."""
_MUTED_S = 10.0
_MAX_PEERS = 1024
"""Peers that are remembered; the one that was added first is forgotten first."""


class BadPeers:
    """Counts malformed frames of each peer."""

    def __init__(self) -> None:
        self._num_bad: dict[bytes, int] = {}
        self._muted_until_s: dict[bytes, float] = {}

    @property
    def has_muted(self) -> bool:
        """False if `is_muted` is false for every peer."""
        return bool(self._muted_until_s)

    def is_muted(self, peer: bytes, *, now_s: float) -> bool:
        """True if this peer's frames are to be dropped unread."""
        until_s = self._muted_until_s.get(peer)
        if until_s is None:
            return False
        if now_s < until_s:
            return True
        del self._muted_until_s[peer]
        return False

    def record(self, peer: bytes, *, now_s: float) -> None:
        """Counts a malformed frame."""
        num_bad = self._num_bad.pop(peer, 0) + 1
        if num_bad < _ALLOWED:
            _put(self._num_bad, peer, num_bad)
        else:
            _put(self._muted_until_s, peer, now_s + _MUTED_S)


def _put(entries: dict[bytes, _Value], peer: bytes, value: _Value) -> None:
    while len(entries) >= _MAX_PEERS:
        del entries[next(iter(entries))]
    entries[peer] = value
