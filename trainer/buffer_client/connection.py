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
from areal_like.security.keyring import Keyring
from areal_like.wire.buffer_connection import BufferConnection
from areal_like.wire.messages.hello import Hello
from areal_like.wire.messages.producer import HeartbeatAck

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0


class RankConnection(BufferConnection):
    """The connection of one rank to one buffer."""

    def __init__(
        self,
        address: str,
        *,
        hello: Hello,
        survives: bool,
        max_message_bytes: int,
        on_other: Callable[[Any], None],
        on_ack: Callable[[HeartbeatAck], None],
        fail: Callable[[ArealError], None],
        keyring: Keyring | None = None,
        look_up: Callable[[], str | None] | None = None,
    ) -> None:
        """`survives`: True if the buffer's ledger survives a kill of the buffer.

        `on_ack`: called with every HeartbeatAck. `on_other`: called with every other message that is not a
        reply. `fail`: called with an error that neither waiting nor registering again can resolve. `look_up`:
        see `BufferConnection`.
        """
        super().__init__(address, max_message_bytes=max_message_bytes, keyring=keyring, look_up=look_up)
        self._hello = hello
        self._survives = survives
        self._on_other = on_other
        self._on_ack = on_ack
        self._fail = fail
        self._registering: asyncio.Task[None] | None = None

    @property
    def is_troubled(self) -> bool:
        """True if the buffer does not respond or cannot write: replies may be delayed until that ends."""
        return self.is_silent or bool(self.trouble)

    async def say_hello(self, *, timeout_s: float) -> None:
        """Sends Hello and waits for the Welcome. Raises like `BufferConnection.register`."""
        await self.register(self._hello, timeout_s=timeout_s)

    def close(self) -> None:
        if self._registering is not None:
            self._registering.cancel()
        super().close()

    def on_message(self, message: Any) -> None:
        """Logs what the buffer waits for, and passes messages on."""
        if not isinstance(message, HeartbeatAck):
            self._on_other(message)
            return
        self._on_ack(message)
        if message.trouble and not self.trouble:
            log.warning("waiting for the buffer at %s: %s", self.address, message.trouble)

    def fatal(self, error: ArealError) -> None:
        self._fail(error)

    def hello_required(self) -> None:
        """Registers again if the buffer has kept its ledger."""
        if self._survives:
            self._start_registering()
        else:
            self.fatal(
                PeerLostError(
                    "the buffer was restarted and its in-memory store is gone: start again with resume=latest"
                )
            )

    def reopened(self) -> None:
        """Registers again: the buffer may have lost this rank."""
        super().reopened()
        self._start_registering()

    def _start_registering(self) -> None:
        if self._registering is None or self._registering.done():
            self._registering = asyncio.create_task(self._register_again(), name="hello again")

    async def _register_again(self) -> None:
        """Registers and resends requests: a restarted buffer has only its ledger."""
        try:
            await self.say_hello(timeout_s=_HELLO_TIMEOUT_S)
        except DeadlineError:  # the buffer is down again; once it is back, it sends HelloRequired again
            return
        except ArealError as error:
            self.fatal(error)
            return
        log.info("registered again at the buffer at %s", self.address)
        self.resend_pending()
