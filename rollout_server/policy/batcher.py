"""Sends generate requests that start in the same turn of the event loop as one streaming request.

At a few hundred samples per second on two cores, one HTTP request per sample would be the bottleneck. Each
`generate` call still returns when its own sequence ends. If an engine responds in the packed form
(areal_like/http/streams.py), later requests to it are also sent in that form.

    sent in a batch -> completed
                    -> the batch ends early (an error event, a refusal, a broken stream) -> sent alone, once
                    -> its time limit is over -> aborted: the partial tokens, finish reason TIMEOUT
    sent alone      -> completed | fails

So a request that the engine cannot complete fails alone. SGLang ends the stream of a whole batch because of
one prompt that is too long. It reports neither the prompt's index nor the other sequences, which would
continue without a reader, so they are aborted. A request that is sent again gets a new id, because SGLang
aborts the requests of a broken stream by id two seconds later.

Stop texts are found here, in the chunks of a stream (stop_texts.py); the request is then aborted.

A request has no time limit unless its caller sets one: while the engine makes progress, so do its requests,
including those in its queue. An engine without progress is replaced (supervisor.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import aiohttp

from areal_like.errors import EngineError, EngineTimeoutError, RoutesError
from areal_like.http.streams import FRAMES, MAX_EVENT_BYTES, read_events, read_frames
from areal_like.trajectory import FinishReason
from rollout_server.policy.generation import (
    Generation,
    Sampling,
    checked,
    encode_request,
    is_last,
    output_tokens,
    parse_generation,
    refusal,
)
from rollout_server.policy.http import CONNECT_TIMEOUT_S, EngineHttp, error_text
from rollout_server.policy.routes import RoutesReader
from rollout_server.policy.stop_texts import StopTexts, StopWatch

logger = logging.getLogger(__name__)

MAX_BATCH = 256
"""Maximum number of sequences in one HTTP request: bounds its body, and the loss when a connection breaks."""
_LONG_ROUTES = 1 << 20
"""Longer routes, in characters or bytes, are read in a thread."""
_ABORT_GRACE_S = 5.0
"""Time that an engine has to return the partial tokens of sequences aborted at their time limit."""


@dataclass(eq=False)
class _Pending:
    """One `generate` call that has not returned."""

    rid: str
    """Request id on the wire."""
    input_ids: Sequence[int]
    sampling: Mapping[str, Any]
    future: asyncio.Future[Generation]
    cache_salt: str = ""
    """Prefixes are shared only between requests with the same salt."""
    lora_path: str = ""
    """Name of the adapter that samples it; empty: none."""
    on_first_token: Callable[[], None] | None = None
    """Called once, when the prompt has been computed."""
    timeout_s: float = math.inf
    """Time limit, counted from the call of `generate`."""
    deadline_s: float = math.inf
    """Loop time at which the time limit expires."""
    is_late: bool = False
    """True once the time limit has expired."""
    keeps_prefix: bool = False
    """True if another request may continue this one."""
    stop_watch: StopWatch | None = None
    """None without stop texts."""
    returns_routes: bool = False
    """True if the generation needs routes."""

    def fail(self, error: EngineError) -> None:
        """Fails the call with a copy of `error`, because the error may be shared by a whole batch."""
        if not self.future.done():
            self.future.set_exception(type(error)(str(error)))


class GenerateBatcher:
    """Sends generate requests to one engine. Belongs to one event loop."""

    def __init__(self, http: EngineHttp, *, stream_interval: int = 0) -> None:
        """`stream_interval`: sent with each request unless it is 0."""
        self._http = http
        self._is_packed = False
        """True once the engine has responded in the packed form."""
        self._streaming = {"stream_interval": stream_interval} if stream_interval else {}
        self.stop_texts = StopTexts()
        self.routes: RoutesReader | None = None
        """Reads the routes of generations; None: the engine returns none."""
        self._queued: list[_Pending] = []
        """Requests made in this turn of the loop."""
        self._open: dict[str, _Pending] = {}
        """The caller's request id -> its call."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_prompt_tokens = self.num_cached_tokens = 0
        """Prompt tokens of all finished requests, and how many of them were in the prefix cache."""

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        sampling: Sampling,
        rid: str | None,
        timeout_s: float = math.inf,
        cache_salt: str = "",
        lora_path: str = "",
        on_first_token: Callable[[], None] | None = None,
    ) -> Generation:
        """Samples one continuation of `input_ids`, in a batch with the other calls of this turn of the event
        loop.

        See EngineClient.generate.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Generation] = loop.create_future()
        rid = rid or uuid.uuid4().hex
        params, stop_watch = sampling.to_dict() | self._streaming, None
        if sampling.stop:
            stop_params, stop_watch = self.stop_texts.prepare(sampling, input_ids)
            params |= stop_params
        pending = _Pending(
            _wire_rid(rid),
            input_ids,
            params,
            future,
            cache_salt,
            lora_path,
            on_first_token,
            timeout_s,
            loop.time() + timeout_s,
            keeps_prefix=sampling.keeps_prefix,
            stop_watch=stop_watch,
            returns_routes=sampling.returns_routes,
        )
        self._open.setdefault(rid, pending)
        if not self._queued:
            loop.call_soon(self._flush)
        self._queued.append(pending)
        try:
            return await future
        except asyncio.CancelledError:
            self._spawn(self._abort_quietly([pending.rid]))
            raise
        finally:
            if self._open.get(rid) is pending:
                del self._open[rid]

    def wire_rid(self, rid: str) -> str:
        """Returns the id by which the engine currently knows a request."""
        pending = self._open.get(rid)
        return _wire_rid(rid) if pending is None else pending.rid

    async def close(self) -> None:
        """Ends every stream (the engine then aborts their sequences) and fails all pending requests."""
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # From Python 3.12 on, gather does not wait for the callbacks of tasks that are done.
            self._tasks.difference_update(tasks)
        for pending in self._queued:
            pending.fail(EngineError("the client was closed"))
        self._queued.clear()

    def _flush(self) -> None:
        queued, self._queued = self._queued, []
        batch: list[_Pending] = []
        rids: set[str] = set()
        for pending in queued:
            if pending.future.done():
                continue
            if pending.rid in rids:
                pending.fail(EngineError(f"rid {pending.rid[:-1]} is used twice at the same time"))
                continue
            rids.add(pending.rid)
            batch.append(pending)
        for start in range(0, len(batch), MAX_BATCH):
            self._start(batch[start : start + MAX_BATCH])

    def _start(self, batch: list[_Pending]) -> None:

        def fail_cancelled(stream: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first turn never enters `_stream`, nor its `finally`.
            for pending in batch if stream.cancelled() else ():
                pending.fail(EngineError("the client was closed"))

        self._spawn(self._stream(batch)).add_done_callback(fail_cancelled)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _stream(self, batch: list[_Pending]) -> None:
        """Sends a batch until every call is completed, failed, or sent again alone."""
        error = EngineError("the client was closed")
        late: asyncio.Task[None] | None = None
        if any(pending.deadline_s < math.inf for pending in batch):
            stream = asyncio.current_task()
            assert stream is not None
            late = self._spawn(self._abort_late(batch, stream))
        try:
            error = await self._read(batch)
        finally:
            # Also on cancellation: no caller may be left waiting for a stream that has ended.
            if late is not None:
                late.cancel()
            self._end(batch, error)

    async def _read(self, batch: list[_Pending]) -> EngineError:
        """Passes the completions of a stream to their callers. Returns the error for callers that got
        none."""
        name = f"engine {self._http.base_url}"
        content, headers = encode_request(
            [pending.rid for pending in batch],
            [pending.input_ids for pending in batch],
            [pending.sampling for pending in batch],
            keeps_prefix=[pending.keeps_prefix for pending in batch],
            cache_salts=[pending.cache_salt for pending in batch],
            lora_paths=[pending.lora_path for pending in batch],
            returns_routes=any(pending.returns_routes for pending in batch),
            is_packed=self._is_packed,
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._http.session.post(
                f"{self._http.base_url}/generate",
                data=content,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    reason = await error_text(response)
                    return refusal(response.status, f"{name} refused /generate: {reason}")
                self._is_packed = response.content_type == FRAMES
                read = read_frames if self._is_packed else read_events
                max_bytes = MAX_EVENT_BYTES + self._most_bytes_of_routes(batch)
                async for event in read(response.content.iter_any(), max_bytes=max_bytes):
                    await self._resolve(batch, checked(event))
        except EngineError as error:
            return type(error)(f"{name} refused a request: {error}")
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            return EngineError(f"{name} was lost: {error or type(error).__name__}")
        return EngineError(f"{name} closed the stream before every sequence had ended")

    def _end(self, batch: list[_Pending], error: EngineError) -> None:
        """Sends each incomplete request of a batch again, alone; fails one that was already alone."""
        left = [pending for pending in batch if not pending.future.done()]
        is_final = len(batch) == 1 or self._http.is_closed
        if is_final or not left:
            for pending in left:
                pending.fail(error)
            return
        logger.warning("%s: %d requests are sent again, each alone", error, len(left))
        self._spawn(self._abort_quietly([pending.rid for pending in left]))
        for pending in left:
            pending.rid = _wire_rid(f"{pending.rid[:-1]}~1")
            if pending.stop_watch is not None:
                pending.stop_watch.restart()
            self._start([pending])

    async def _abort_late(self, batch: list[_Pending], stream: asyncio.Task[None]) -> None:
        """Aborts each sequence at its time limit, so that it returns its tokens; soon after, fails it.

        Then ends the stream if every call of the batch has returned: an engine that ignores the abort would
        keep it open.
        """
        loop = asyncio.get_running_loop()
        due = sorted({pending.deadline_s for pending in batch if pending.deadline_s < math.inf})
        for deadline_s in sorted([*due, *(deadline_s + _ABORT_GRACE_S for deadline_s in due)]):
            await asyncio.sleep(deadline_s - loop.time())
            left = [pending for pending in batch if not pending.future.done()]
            late = [pending for pending in left if pending.deadline_s <= deadline_s and not pending.is_late]
            for pending in late:
                pending.is_late = True
            if late:
                self._spawn(self._abort_quietly([pending.rid for pending in late]))
            for pending in left:
                if pending.deadline_s + _ABORT_GRACE_S <= deadline_s:
                    pending.fail(self._timeout_error(pending))
        if all(pending.future.done() for pending in batch):
            stream.cancel()

    async def _resolve(self, batch: list[_Pending], event: dict[str, Any]) -> None:
        """If this event ends a sequence, passes its generation or error to the caller that waits for it.

        Raises ValueError if the event belongs to no sequence of the batch.
        """
        try:
            index = int(event.get("index", 0))
            pending = batch[index] if index >= 0 else batch[len(batch)]
            if not is_last(event):
                self._read_chunk(pending, event)
                return
        except (KeyError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"malformed event ({type(error).__name__}: {error})") from None
        try:
            generation = await self._with_routes(pending, parse_generation(event), event)
        except EngineError as error:
            pending.fail(error)
            return
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
            pending.fail(EngineError(f"malformed response of the engine ({type(error).__name__}: {error})"))
            return
        if pending.stop_watch is not None:
            generation = pending.stop_watch.cut(generation)
        self.num_prompt_tokens += generation.num_prompt_tokens
        self.num_cached_tokens += generation.num_cached_tokens
        if pending.is_late and generation.finish_reason is FinishReason.ABORT:
            if not len(generation.output_ids):
                pending.fail(self._timeout_error(pending))
                return
            generation = replace(generation, finish_reason=FinishReason.TIMEOUT)
        if not pending.future.done():
            pending.future.set_result(generation)

    async def _with_routes(
        self, pending: _Pending, generation: Generation, event: dict[str, Any]
    ) -> Generation:
        """Adds the routes that a request asked for. Raises RoutesError if they are missing or do not fit."""
        num_sampled = len(generation.output_ids)
        if not pending.returns_routes or not num_sampled:
            return generation
        if self.routes is None:
            raise RoutesError(f"engine {self._http.base_url} records no routes (model.router_replay)")
        raw = event["meta_info"].get("routed_experts")
        num_tokens = len(pending.input_ids) + num_sampled - 1
        read = partial(self.routes.read, raw, num_tokens=num_tokens)
        is_long = isinstance(raw, str | bytes) and len(raw) > _LONG_ROUTES
        return replace(generation, routes=await asyncio.to_thread(read) if is_long else read())

    def _most_bytes_of_routes(self, batch: Sequence[_Pending]) -> int:
        """The most bytes that routes add to one event of a batch."""
        if self.routes is None or not any(pending.returns_routes for pending in batch):
            return 0
        lengths = [len(pending.input_ids) + pending.sampling["max_new_tokens"] for pending in batch]
        return self.routes.response_bytes(max(lengths))

    def _read_chunk(self, pending: _Pending, event: dict[str, Any]) -> None:
        if pending.on_first_token is not None:
            pending.on_first_token()
            pending.on_first_token = None
        if pending.stop_watch is not None and pending.stop_watch.read(output_tokens(event).tolist()):
            self._spawn(self._abort_quietly([pending.rid]))

    def _timeout_error(self, pending: _Pending) -> EngineTimeoutError:
        limit = f"{pending.timeout_s:g} s (rollout.sample_timeout_s)"
        return EngineTimeoutError(f"engine {self._http.base_url} returned no token within {limit}")

    async def _abort_quietly(self, rids: Iterable[str]) -> None:
        for rid in rids:
            try:
                await self._http.call("POST", "/abort_request", {"rid": rid})
            except EngineError as error:
                logger.debug("abort of %s: %s", rid, error)
                return


def _wire_rid(rid: str) -> str:
    """Returns the request id as sent to the engine, with an end mark.

    SGLang aborts every request whose id *starts with* the given one: without the mark, aborting `1` would
    also abort `12`.
    """
    return f"{rid};"
