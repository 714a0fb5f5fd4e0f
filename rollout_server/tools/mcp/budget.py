"""What a server may send for one request: bytes and messages. Pure."""

from __future__ import annotations

from collections.abc import Callable

_MAX_MESSAGES = 1000
"""Reports of progress, log messages and requests of the server, each of which costs CPU time."""


class Budget:
    """Counts what a server sends, and refuses more than the limit."""

    def __init__(self, max_bytes: int, refuse: Callable[[str], None]) -> None:
        """`refuse`: ends the connection because of what the server did, in words."""
        self.max_bytes = max_bytes
        self.refuse = refuse
        self.renew()

    def renew(self) -> None:
        """Starts to count for another request."""
        self._bytes_left = self.max_bytes
        self._messages_left = _MAX_MESSAGES

    def take(self, num_bytes: int) -> None:
        """Counts bytes."""
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            self.refuse(f"it sent more than max_response_bytes={self.max_bytes} for one request")

    def take_message(self) -> None:
        """Counts a message."""
        self._messages_left -= 1
        if self._messages_left < 0:
            self.refuse(f"it sent more than {_MAX_MESSAGES} messages for one request")
