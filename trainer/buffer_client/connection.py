"""A rank's connection to one buffer: registered there, also after the buffer was started again.

    (start) -> hello -> REGISTERED -> "who are you?" -> hello, every request that waits once more -> REGISTERED

Used from the link's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from areal_like.errors import ArealError, DeadlineError, PeerLostError
from areal_like.wire.channel import Link
from areal_like.wire.messages.hello import Hello, HelloRequired, JobFailed
from areal_like.wire.messages.producer import HeartbeatAck

log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0
_SILENT_AFTER_S = 5.0


class Connection:
    """See the module."""

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
        """`survives`: whether a buffer that was killed comes back with its ledger. `fail` hears of what cannot be waited out."""
        self._hello = hello
        self._survives = survives
        self._on_other = on_message
        self._fail = fail
        self._link = Link(address, handler=self._on_message, max_message_bytes=max_message_bytes)
        self._loop = asyncio.get_running_loop()
        self._rehello: asyncio.Task[None] | None = None
        self._trouble = ""
        self.address = address
        self.call = self._link.call
        """As `Link.call`."""

    @property
    def silent_s(self) -> float:
        """Since anything was heard."""
        return self._loop.time() - self._link.last_heard_s

    @property
    def is_stuck(self) -> bool:
        """It answers, and says that it cannot write."""
        return bool(self._trouble) and self.silent_s <= _SILENT_AFTER_S

    @property
    def is_troubled(self) -> bool:
        """It does not answer, or says that it cannot write."""
        return self.silent_s > _SILENT_AFTER_S or bool(self._trouble)

    async def register(self, *, timeout_s: float) -> None:
        """Says hello. Raises as `call`."""
        await self._link.call(self._hello, timeout_s=timeout_s)

    def send(self, message: Any) -> None:
        """Queues a one-way message."""
        self._link.send(message)

    def close(self) -> None:
        """Closes the socket and fails what is pending."""
        if self._rehello is not None:
            self._rehello.cancel()
        self._link.close()

    def _on_message(self, message: Any) -> None:
        match message:
            case HeartbeatAck():
                if message.trouble and not self._trouble:
                    log.warning(
                        "the buffer at %s is in trouble, its answers are waited for: %s",
                        self.address,
                        message.trouble,
                    )
                self._trouble = message.trouble
            case JobFailed():
                self._fail(ArealError(message.reason))
            case HelloRequired() if not self._survives:
                self._fail(
                    PeerLostError(
                        "the buffer was restarted and its in-memory store is gone: start again with resume=latest"
                    )
                )
            case HelloRequired():
                self._trouble = ""  # another process
                if self._rehello is None or self._rehello.done():
                    self._rehello = asyncio.create_task(self._register_again(), name="hello again")
            case _:
                self._on_other(message)

    async def _register_again(self) -> None:
        """A restarted buffer has its ledger and has forgotten who asked for what."""
        try:
            await self.register(timeout_s=_HELLO_TIMEOUT_S)
        except DeadlineError:  # away again; when it is back it will say again that it does not know us
            return
        except ArealError as error:
            self._fail(error)
            return
        log.info("registered again at the buffer at %s", self.address)
        self._link.ask_again()
