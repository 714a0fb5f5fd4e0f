"""A connection to one buffer for a rollout server or a trainer rank: registration, silence, trouble.

    UNREGISTERED -> register() -> REGISTERED -> HelloRequired (the buffer was restarted) -> UNREGISTERED

A buffer may be restarted at the same address: it then answers `HelloRequired` to peers that have not
registered. Two other conditions are distinguished, because they need different behaviour:

    silent   nothing was received for SILENT_AFTER_S: messages pile up in the socket, so send only a hello
    stuck    it answers, but reports that it cannot write (a full disk): it queues one reply for each
             request that it receives, so do not send a request again

When to register again, and which requests to repeat then, is left to the owner: the two roles differ in that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from areal_like.errors import ArealError
from areal_like.wire.channel import Link
from areal_like.wire.messages.hello import Hello, HelloRequired, JobFailed, Welcome
from areal_like.wire.messages.producer import HeartbeatAck

SILENT_AFTER_S = 5.0
"""A buffer answers each heartbeat, so a few missed answers mean that it is gone or unreachable."""


class BufferConnection:
    """Use it from its own event loop only."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        on_message: Callable[[Any], None],
        on_hello_required: Callable[[], None],
        on_fatal: Callable[[ArealError], None],
    ) -> None:
        """`on_message` gets all one-way messages but HelloRequired (`on_hello_required`) and JobFailed."""
        self.address = address
        self.is_registered = False
        self.trouble = ""
        """Why the buffer cannot write, from its last heartbeat answer; empty if it can."""
        self._link = Link(address, handler=self._handle, max_message_bytes=max_message_bytes)
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_hello_required = on_hello_required
        self._on_fatal = on_fatal
        self.call = self._link.call
        """As `Link.call`."""
        self.send = self._link.send
        """As `Link.send`."""
        self.ask_again = self._link.ask_again
        """As `Link.ask_again`."""

    @property
    def silent_s(self) -> float:
        """Seconds since anything was received."""
        return self._loop.time() - self._link.last_heard_s

    @property
    def is_silent(self) -> bool:
        """Whether nothing was received for longer than SILENT_AFTER_S."""
        return self.silent_s > SILENT_AFTER_S

    @property
    def is_stuck(self) -> bool:
        """Whether the buffer answers but cannot write."""
        return bool(self.trouble) and not self.is_silent

    async def register(self, hello: Hello, *, timeout_s: float) -> Welcome:
        """Says hello. Raises DeadlineError without an answer, RefusedError if it is refused."""
        welcome = await self.call(hello, timeout_s=timeout_s)
        assert isinstance(welcome, Welcome)
        self.is_registered = True
        return welcome

    def close(self) -> None:
        """Closes the socket and fails pending calls."""
        self._link.close()

    def _handle(self, message: Any) -> None:
        match message:
            case JobFailed():
                self._on_fatal(ArealError(message.reason))
            case HelloRequired():
                self.is_registered = False
                self.trouble = ""  # it was reported by the process before
                self._on_hello_required()
            case HeartbeatAck():
                self._on_message(message)  # first, so that the owner can compare it with `trouble`
                self.trouble = message.trouble
            case _:
                self._on_message(message)
