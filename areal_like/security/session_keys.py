"""Keys of sessions: any rollout server of a run can tell whether a key is that of a session.

    key = NONCE.HMAC-SHA256(secret, "ID NONCE")

The secret is the buffer's (`Welcome.session_secret`) and the same for all servers and restarts of a run. So a
server that does not have a session knows, without a message, that a client with its key has a right to hear
where it is, and a client without a key learns nothing. The key says nothing about other sessions. A session
has one key at a time: the server that has the session compares it, so the nonce of an offer that was taken
back opens nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from areal_like.shards import Shard

_NONCE_BYTES = 16
_SECRET_BYTES = 31


def new_secret() -> int:
    """A random secret, as a number of 31 bytes."""
    return int.from_bytes(secrets.token_bytes(_SECRET_BYTES))


def secret_text(secret: int) -> str:
    """The form of a secret on the wire."""
    return secret.to_bytes(_SECRET_BYTES).hex()


class SessionKeys:
    """The secrets of a run's buffers, as one server knows them."""

    def __init__(self) -> None:
        self._by_shard: dict[int, bytes] = {}
        self._num_shards = 1
        self.num_expected = 0
        """Number of buffers whose secrets have to be known before any key is said to be wrong."""
        self._own = secrets.token_bytes(_SECRET_BYTES)
        """Used until a buffer has sent its secret."""

    @property
    def are_known(self) -> bool:
        """False while a key may be right although `is_key` returns False."""
        return len(self._by_shard) >= self.num_expected

    def set_secret(self, shard: Shard, text: str) -> None:
        """Sets the secret of a buffer. Raises ValueError if `text` is not hexadecimal."""
        self._num_shards = shard.count
        self._by_shard[shard.index] = bytes.fromhex(text)

    def new_key(self, id: str) -> str:
        """A new key of a session."""
        return self.key_of(id, secrets.token_urlsafe(_NONCE_BYTES))

    def key_of(self, id: str, nonce: str) -> str:
        """The key of a session with this nonce."""
        digest = hmac.digest(self._secret_of(id), f"{id} {nonce}".encode(), hashlib.sha256)
        return f"{nonce}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    def is_key(self, id: str, key: str) -> bool:
        """True if this is, or was, a key of the session."""
        wanted = self.key_of(id, nonce_of(key))
        return hmac.compare_digest(wanted.encode(), key.encode())

    def _secret_of(self, id: str) -> bytes:
        ticket = id.partition("-")[0]
        if not (ticket.isascii() and ticket.isdecimal() and 0 < len(ticket) < _MAX_DIGITS):
            return self._own
        return self._by_shard.get(Shard.of(int(ticket), count=self._num_shards).index, self._own)


_MAX_DIGITS = 20


def nonce_of(key: str) -> str:
    """The public part of a key."""
    return key.partition(".")[0]
