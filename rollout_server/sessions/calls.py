"""The requests of one session to the model, and their repetitions.

An SDK repeats a request after a timeout or a broken connection. The repetition joins the call of the first
request: the policy samples one turn, and every client gets the same response.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from areal_like.errors import SessionGoneError
from rollout_server.conversation.turns import SampledTurn


class Call:
    """One request to the model, and its repetitions."""

    def __init__(self, task: asyncio.Task[SampledTurn], *, gone: Callable[[], str]) -> None:
        """`gone`: returns the message to clients when the session has ended."""
        self.id = uuid.uuid4().hex
        """The completion's id is derived from it."""
        self.task = task
        self.num_readers = 0
        """Number of clients that wait for the response."""
        self.body: bytes | None = None
        """The response body while clients are connected; equal requests get equal bodies."""
        self.is_delivered = False
        """True once the whole response was sent to a client."""
        self._gone = gone

    async def turn(self) -> SampledTurn:
        """Returns the sampled turn; cancelling the caller does not affect other callers. Raises as the
        session's `sample_turn` does."""
        self.num_readers += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.task.cancelled():  # before its first step: later it ends with a SessionGoneError
                raise SessionGoneError(self._gone()) from None
            raise
        finally:
            self.num_readers -= 1

    @property
    def has_failed(self) -> bool:
        """True if it ended without a turn."""
        task = self.task
        return task.done() and (task.cancelled() or task.exception() is not None)

    @property
    def is_lost(self) -> bool:
        """True if its clients disconnected before they got the response."""
        return self.num_readers == 0 and not self.is_delivered


class Calls:
    """The calls of one session. Belongs to one event loop."""

    def __init__(self, *, gone: Callable[[], str]) -> None:
        """`gone`: returns the message to clients when the session has ended."""
        self._gone = gone
        self._by_digest: dict[bytes, list[Call]] = {}
        """Calls by the digest of their bodies."""
        self._by_id: dict[str, Call] = {}

    def begin(
        self, digest: bytes, ask: Callable[[], Coroutine[Any, Any, SampledTurn]], *, is_repetition: bool
    ) -> Call:
        """Returns the call for a request: a new one, or the one that it repeats (see OpenSession.begin)."""
        usable = [call for call in self._by_digest.get(digest, ()) if not call.has_failed]
        lost = [call for call in usable if call.is_lost]
        # Equal requests that were sent and lost at the same time get one turn each.
        if joined := lost or (usable if is_repetition else []):
            return joined[-1]
        call = Call(asyncio.get_running_loop().create_task(ask()), gone=self._gone)
        self._by_digest.setdefault(digest, []).append(call)
        self._by_id[call.id] = call
        call.task.add_done_callback(lambda _: self._forget_failed(call, digest))
        return call

    def find(self, completion_id: str) -> Call | None:
        """Returns the call that produced a completion (`chatcmpl-...`, `cmpl-...`); None if there is none."""
        call = self._by_id.get(completion_id.rpartition("-")[2])
        return call if call is not None and call.task.done() and not call.has_failed else None

    def completed(self) -> Iterator[tuple[Call, SampledTurn]]:
        """Yields the calls that have a turn, newest first."""
        for call in reversed(self._by_id.values()):
            if call.task.done() and not call.has_failed:
                yield call, call.task.result()

    def cancel(self) -> None:
        for call in self._by_id.values():
            call.task.cancel()

    def _forget_failed(self, call: Call, digest: bytes) -> None:
        """Forgets a failed call: none can join it, and a client may send any number of requests that fail."""
        if call.has_failed:  # also retrieves its exception, as there may be no client to do so
            del self._by_id[call.id]
            same = self._by_digest[digest]
            same.remove(call)
            if not same:
                del self._by_digest[digest]
