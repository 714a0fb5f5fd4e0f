"""A rollout server's or trainer rank's connection to one buffer.

It registers the peer, and detects a buffer that does not respond or cannot write.

    UNREGISTERED -> register() -> REGISTERED -> HelloRequired (the buffer was restarted) -> UNREGISTERED

A buffer may be restarted at the same address, or at another one that `look_up` finds. The new process sends
`HelloRequired` to peers that have not registered. Two other conditions need different behavior:

    silent   Nothing was received for SILENT_AFTER_S, and messages pile up in the socket. A rollout server
             sends only a hello until the buffer replies. A trainer rank, which sends little, continues its
             heartbeats and resends its requests.
    stuck    The buffer replies, but reports that it cannot write (a full disk). It queues one reply per
             request that it receives, so neither of them sends a request again.

The owner of the connection decides when to register again and which requests to repeat then, because rollout
servers and trainer ranks differ in this too.

A new process may find its name still taken by its predecessor, which still responds but is about to end. So
`register` repeats a hello that was refused because of its name for NAME_RETRY_S.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from areal_like.errors import ArealError, RefusedError
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole
from areal_like.spans import recorder
from areal_like.wire.channel import Link
from areal_like.wire.curve import CurveClient
from areal_like.wire.messages.hello import (
    AreYouAlive,
    Drain,
    Hello,
    HelloRequired,
    JobFailed,
    JobFinished,
    Refused,
    StillAlive,
    Welcome,
)
from areal_like.wire.messages.producer import HeartbeatAck

SILENT_AFTER_S = 5.0
"""A buffer replies to each heartbeat, so a few missing replies mean that it is gone or unreachable."""
NAME_RETRY_S = 8.0
"""Time for which a hello is repeated while another process has the name."""
_NAME_RETRY_PAUSE_S = 0.5
_FOLLOW_S = 1.0
"""Interval at which the address of a buffer that does not respond is looked up."""

log = logging.getLogger(__name__)


class BufferConnection(Link, ABC):
    """A `Link` that is registered. A subclass decides what the owner does with messages and events.

    This class responds to AreYouAlive. After `reopened` (keys have changed, or the buffer has moved) the
    owner should register again.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        keyring: Keyring | None = None,
        look_up: Callable[[], str | None] | None = None,
    ) -> None:
        """`look_up`: called for the buffer's address while it does not respond; see `buffer_lookup`."""
        super().__init__(
            address,
            handler=self._handle,
            max_message_bytes=max_message_bytes,
            curve=None if keyring is None else CurveClient(keyring, role=KeyRole.BUFFER),
        )
        self.is_registered = False
        self.trouble = ""
        """Why the buffer cannot write, from its last heartbeat reply; empty if it can."""
        self._loop = asyncio.get_running_loop()
        self._clock = recorder.ClockOffset()
        self._following: asyncio.TimerHandle | None = None
        if look_up is not None:
            self._following = self._loop.call_later(_FOLLOW_S, self._follow, look_up)
        self._incarnation = 0
        """Granted by this buffer; 0: none yet."""

    @abstractmethod
    def on_message(self, message: Any) -> None:
        """A one-way message that has no method of its own, or a HeartbeatAck."""

    @abstractmethod
    def hello_required(self) -> None:
        """Called when the buffer was restarted and does not know this process."""

    @abstractmethod
    def fatal(self, error: ArealError) -> None:
        """Called when the job has failed, or the buffer refuses this process."""

    def drain(self) -> None:
        """Called when an operator drains this process."""

    def finished(self) -> None:
        """Called when the run is finished."""

    @property
    def silent_s(self) -> float:
        """Seconds since anything was received."""
        return self._loop.time() - self.last_heard_s

    @property
    def is_silent(self) -> bool:
        """True if nothing was received for longer than SILENT_AFTER_S."""
        return self.silent_s > SILENT_AFTER_S

    @property
    def is_stuck(self) -> bool:
        """True if the buffer replies but cannot write."""
        return bool(self.trouble) and not self.is_silent

    async def register(self, hello: Hello, *, timeout_s: float) -> Welcome:
        """Sends `hello` and returns the reply. `timeout_s`: limit of each attempt.

        Raises DeadlineError without a reply in time, RefusedError if the buffer refuses, RunFinishedError if
        the run is finished.
        """
        until_s = self._loop.time() + NAME_RETRY_S
        while True:
            try:
                granted = dataclasses.replace(hello, incarnation=self._incarnation)
                welcome = await self.call(granted, timeout_s=timeout_s)
                break
            except RefusedError as error:
                if error.field != "name" or self._loop.time() > until_s:
                    raise
                log.warning("%s: trying again for a few seconds", error)
            await asyncio.sleep(_NAME_RETRY_PAUSE_S)
        assert isinstance(welcome, Welcome)
        self._incarnation = welcome.incarnation
        self.is_registered = True
        return welcome

    def close(self) -> None:
        """Closes the socket and fails pending calls."""
        if self._following is not None:
            self._following.cancel()
        super().close()

    def _follow(self, look_up: Callable[[], str | None]) -> None:
        """Connects to another address, once a second, if the buffer was lost and has restarted there."""
        self._following = self._loop.call_later(_FOLLOW_S, self._follow, look_up)
        if self.is_silent and (address := look_up()) not in (None, self.address):
            assert address is not None
            log.info("the buffer at %s stopped responding and restarted at %s", self.address, address)
            self.move(address)

    def reopened(self) -> None:
        """Called after the socket was reopened. One-way messages of both sides may be lost, so the process
        has to register again."""
        self.is_registered = False

    def _note_clock(self, ack: HeartbeatAck) -> None:
        """Notes the clock's offset. Only the first shard sends its time."""
        found = self._clock.heard(sent_s=ack.echo_s, buffer_s=ack.unix_s, now_s=recorder.unix_now())
        if found is not None:
            recorder.note_offset(offset_s=found[0], rtt_s=found[1])

    def _handle(self, message: Any) -> None:
        match message:
            case Refused():
                self.fatal(
                    RefusedError(f"the buffer refused this process ({message.field}): {message.reason}")
                )
            case JobFailed():
                self.fatal(ArealError(message.reason))
            case HelloRequired():
                self.is_registered = False
                self.trouble = ""  # the previous process reported it
                self.hello_required()
            case AreYouAlive():
                self.send(StillAlive())
            case Drain():
                self.drain()
            case JobFinished():
                self.finished()
            case HeartbeatAck():
                self.on_message(message)  # first, so that the owner can compare it with `trouble`
                self.trouble = message.trouble
                self._note_clock(message)
            case _:
                self.on_message(message)
