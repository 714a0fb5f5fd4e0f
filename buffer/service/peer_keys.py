"""Checks which key may act as which peer, on a job with keys. Without keys every check passes.

A key has one role, and a name belongs to the key that registered it first, for as long as that key is valid:
a server's key does not help to take over another server's name. Several processes may share a key. A renewed
key has the name of the old one, so it keeps what the old one registered.
"""

from __future__ import annotations

from collections.abc import Iterable

from areal_like.errors import RefusedError
from areal_like.security.keyring import Keyring
from areal_like.security.keys import AllowedKey, KeyRole
from areal_like.wire.messages.hello import Hello, Role
from buffer.service.peers import Peer

_RENEWAL_S = 3.0
"""Seconds without a message after which a peer is removed if its key was renewed and has expired: every
daemon reads its new key within a second, so such a peer has only the old key."""
_MAX_OWNERS = 4096
"""Number of names whose first key is remembered; the oldest are forgotten first."""


class PeerKeys:
    """The checks by key."""

    def __init__(self, keyring: Keyring | None) -> None:
        self._keyring = keyring
        self._owners: dict[str, AllowedKey] = {}
        """Name of a peer -> key that registered it first."""

    def _is_valid(self, key: AllowedKey) -> bool:
        """True if exactly this key is valid."""
        return self._keyring is None or self._keyring.sender(key.public) is not None

    def _has_successor(self, key: AllowedKey) -> bool:
        """True if a valid key has the name and role of this one, which may be the key itself."""
        return self._keyring is None or self._keyring.is_named(key.name, key.role)

    def check_hello(self, hello: Hello, key: AllowedKey | None) -> None:
        """Raises RefusedError if this key may not register this peer."""
        if key is None:
            return
        if not self._is_valid(key):  # no longer: the peer has waited for the name
            raise RefusedError("key", f"the key {key.name} is revoked or has expired")
        if KeyRole(hello.role.value) is not key.role:
            raise RefusedError(
                "key role", f"the key {key.name} of role {key.role.value} is not a {hello.role.value}'s"
            )
        owner = self._owners.get(hello.name)
        if owner is not None and owner.name != key.name and self._has_successor(owner):
            raise RefusedError(
                "key name",
                f"{hello.name} was registered with the key {owner.name}, not {key.name}: "
                "choose another name, or revoke that key",
            )

    def registered(self, name: str, key: AllowedKey | None) -> None:
        if key is not None:
            self._owners.pop(name, None)
            self._owners[name] = key
            while len(self._owners) > _MAX_OWNERS:
                del self._owners[next(iter(self._owners))]

    def check_message(self, peer: Peer, key: AllowedKey | None) -> None:
        """Raises RefusedError if a message comes with another key than the hello of its peer."""
        if key is not None and (peer.key is None or peer.key.name != key.name):
            known = "none" if peer.key is None else peer.key.name
            raise RefusedError("key", f"{peer.hello.name} registered with the key {known}, not {key.name}")

    def revoked(self, peers: Iterable[Peer], *, now_s: float) -> list[Peer]:
        """The peers whose key is no longer valid and was not renewed."""
        return [
            peer
            for peer in peers
            if peer.key is not None
            and not self._is_valid(peer.key)
            and not (self._has_successor(peer.key) and now_s - peer.last_heard_s < _RENEWAL_S)
        ]


KEY_FIELDS = ("key", "key role", "key name")
"""Fields of the refusals that are counted as refused because of a key."""
ROLES = tuple(KeyRole(role.value) for role in Role)
"""Roles of the keys that may connect to a buffer."""
