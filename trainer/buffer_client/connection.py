"""A trainer rank's connection to one buffer, which registers again by itself after the buffer was restarted.

    register() -> REGISTERED -> HelloRequired -> registers again, repeats pending requests -> REGISTERED
                                  `-> the buffer's store is not durable: its ledger is gone, `fail`

Use it from the event loop of the rank's buffer thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from areal_like.errors import ArealError, DeadlineError, PeerLostError
from areal_like.wire.buffer_connection import BufferConnection
from areal_like.wire.messages.hello import Hello
from areal_like.wire.messages.producer import HeartbeatAck

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0


class Connection:
    """One rank at one buffer."""

    def __init__(
        self,
        address: str,
        *,
        hello: Hello,
        survives: bool,
        max_message_bytes: int,
        on_message: Callable[[Any], None],
        fail: Callable[[ArealError], None],
    ) -> None:
        """`survives`: whether a buffer that was killed comes back with its ledger. `fail` is called with an
        error that waiting cannot mend."""
        self._hello = hello
        self._survives = survives
        self._on_other = on_message
        self._fail = fail
        self._buffer = BufferConnection(
            address,
            max_message_bytes=max_message_bytes,
            on_message=self._on_message,
            on_hello_required=self._on_hello_required,
            on_fatal=fail,
        )
        self._registering: asyncio.Task[None] | None = None
        self.address = address
        self.call = self._buffer.call
        """As `Link.call`."""
        self.send = self._buffer.send
        """As `Link.send`."""

    @property
    def silent_s(self) -> float:
        """Seconds since anything was received."""
        return self._buffer.silent_s

    @property
    def is_stuck(self) -> bool:
        """Whether the buffer answers but cannot write: a repeated request would only add a reply."""
        return self._buffer.is_stuck

    @property
    def is_troubled(self) -> bool:
        """Whether the buffer does not answer or cannot write: answers may take as long as that lasts."""
        return self._buffer.is_silent or bool(self._buffer.trouble)

    async def register(self, *, timeout_s: float) -> None:
        """Says hello. Raises as `call`."""
        await self._buffer.register(self._hello, timeout_s=timeout_s)

    def close(self) -> None:
        """Closes the socket and fails pending calls."""
        if self._registering is not None:
            self._registering.cancel()
        self._buffer.close()

    def _on_message(self, message: Any) -> None:
        if not isinstance(message, HeartbeatAck):
            self._on_other(message)
        elif message.trouble and not self._buffer.trouble:
            log.warning("the buffer at %s cannot write, waiting for it: %s", self.address, message.trouble)

    def _on_hello_required(self) -> None:
        if not self._survives:
            self._fail(
                PeerLostError(
                    "the buffer was restarted and its in-memory store is gone: start again with resume=latest"
                )
            )
        elif self._registering is None or self._registering.done():
            self._registering = asyncio.create_task(self._register_again(), name="hello again")

    async def _register_again(self) -> None:
        """A restarted buffer has its ledger, but no registrations and no pending requests."""
        try:
            await self.register(timeout_s=_HELLO_TIMEOUT_S)
        except DeadlineError:  # it is away again; when it is back, it will send HelloRequired again
            return
        except ArealError as error:
            self._fail(error)
            return
        log.info("registered again at the buffer at %s", self.address)
        self._buffer.resend_pending()
