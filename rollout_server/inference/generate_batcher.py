"""Sends generate requests that start in the same turn of the event loop as one streaming request.

At some hundreds of samples per second on two cores, one HTTP request per sample would be the bottleneck. Each
`generate` call still returns when its own sequence ends.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from areal_like.errors import EngineError
from rollout_server.inference.http import EngineHttp, error_text
from rollout_server.inference.sse import finished_sequence, parse_generation, read_events
from rollout_server.inference.types import Generation, Sampling

logger = logging.getLogger(__name__)

MAX_BATCH = 256
"""Most sequences in one HTTP request: bounds its body, and the loss when a connection breaks."""


@dataclass(eq=False)
class _Pending:
    """One `generate` call that has not returned."""

    rid: str
    input_ids: Sequence[int]
    sampling: Mapping[str, Any]
    future: asyncio.Future[Generation]


class GenerateBatcher:
    """Generate requests of one engine. Belongs to one event loop."""

    def __init__(self, http: EngineHttp, *, timeout_s: float) -> None:
        """`timeout_s`: longest time from the start of a batch to the end of its last sequence."""
        self._http = http
        self._timeout_s = timeout_s
        self._queued: list[_Pending] = []
        """Requests made in this turn of the loop."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None) -> Generation:
        """As EngineClient.generate."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Generation] = loop.create_future()
        pending = _Pending(wire_rid(rid or uuid.uuid4().hex), input_ids, sampling.to_dict(), future)
        if not self._queued:
            loop.call_soon(self._flush)
        self._queued.append(pending)
        try:
            return await future
        except asyncio.CancelledError:
            self._spawn(self._abort_quietly(pending.rid))
            raise

    async def close(self) -> None:
        """Ends every stream (the engine then aborts their sequences) and fails all pending requests."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pending in self._queued:
            _fail(pending, "the client was closed")
        self._queued.clear()

    def _flush(self) -> None:
        queued, self._queued = self._queued, []
        batch: list[_Pending] = []
        rids: set[str] = set()
        for pending in queued:
            if pending.future.done():
                continue
            if pending.rid in rids:
                _fail(pending, f"rid {pending.rid[:-1]} is used twice at the same time")
                continue
            rids.add(pending.rid)
            batch.append(pending)
        for start in range(0, len(batch), MAX_BATCH):
            self._start(batch[start : start + MAX_BATCH])

    def _start(self, batch: list[_Pending]) -> None:
        """Starts a task that streams a batch."""

        def fail_cancelled(stream: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first turn never enters `_stream`, nor its `finally`.
            for pending in batch if stream.cancelled() else ():
                _fail(pending, "the client was closed")

        self._spawn(self._stream(batch)).add_done_callback(fail_cancelled)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _stream(self, batch: list[_Pending]) -> None:
        base_url = self._http.base_url
        body = {
            "rid": [pending.rid for pending in batch],
            "input_ids": [list(map(int, pending.input_ids)) for pending in batch],
            "sampling_params": [pending.sampling for pending in batch],
            "return_logprob": True,
            "stream": True,
        }
        timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=self._http.connect_timeout_s)
        reason = "closed the stream before every sequence had ended"
        try:
            async with self._http.session.post(
                f"{base_url}/generate", json=body, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status == 400 and len(batch) > 1:
                    # The engine refuses a batch because of one bad request. Send each request alone, so that
                    # the good ones do not fail.
                    alone, batch = batch, []
                    for pending in alone:
                        self._start([pending])
                elif response.status != 200:
                    reason = f"refused /generate: {await error_text(response)}"
                else:
                    async for event in read_events(response.content):
                        _resolve(batch, event)
        except TimeoutError:
            reason = f"did not finish within generate_timeout_s={self._timeout_s:g}"
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            reason = f"was lost: {error or type(error).__name__}"
        finally:
            # Also on cancellation: no caller may be left waiting for a stream that has ended.
            for pending in batch:
                _fail(pending, f"engine {base_url} {reason}")

    async def _abort_quietly(self, rid: str) -> None:
        try:
            await self._http.call("POST", "/abort_request", {"rid": rid})
        except EngineError as error:
            logger.debug("abort of %s: %s", rid, error)


def wire_rid(rid: str) -> str:
    """The request id as sent to the engine, with an end mark.

    SGLang aborts every request whose id *starts with* the given one: without the mark, aborting `1` would
    also abort `12`.
    """
    return f"{rid};"


def _resolve(batch: list[_Pending], event: dict[str, Any]) -> None:
    """If this event ends a sequence, passes the generation to the caller that waits for it."""
    try:
        index = finished_sequence(event)
        if index is None:
            return
        future = batch[index].future
        if not future.done():
            future.set_result(parse_generation(event))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"malformed event ({type(error).__name__}: {error})") from None
    except EngineError as error:
        future.set_exception(error)


def _fail(pending: _Pending, message: str) -> None:
    if not pending.future.done():
        pending.future.set_exception(EngineError(message))
