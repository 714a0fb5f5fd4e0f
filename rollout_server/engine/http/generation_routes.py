"""The endpoints for generation: /generate, and abort, pause and continue.

The event loop owns requests (`OpenRequest`). The engine's thread posts outputs to the event loop (`deliver`),
each to its request. If a client disconnects, its sequences are aborted. A stream sends each sequence as one
chunk when it ends, because one chunk per token would cost more than sampling the token; `--stream-interval`
asks for smaller chunks. A client that accepts the packed form gets its stream in that form.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from areal_like.errors import UserError
from areal_like.http.bodies import one_of
from areal_like.http.streams import (
    END_OF_EVENTS,
    END_OF_FRAMES,
    EVENTS,
    FRAMES,
    disconnected,
    encode_event,
    encode_frame,
)
from rollout_server.engine.core import EngineCore
from rollout_server.engine.http.generate_request import (
    GenerateRequest,
    RequestLimits,
    ScoreRequest,
    parse_generate,
    parse_score,
)
from rollout_server.engine.http.protocol import packed_sequence, sequence_json, success
from rollout_server.engine.loop import EngineLoop, SequenceOutput

_PAUSE_MODES = ("abort", "in_place", "retract")


class OpenRequest:
    """One HTTP request at the engine: its sequences, and their outputs that wait to be sent.

    Belongs to the event loop.
    """

    def __init__(self, loop: EngineLoop, request: GenerateRequest) -> None:
        self.request = request
        self.num_running = len(request.sequences)
        """Number of sequences whose final output was not taken yet."""
        self._loop = loop
        self._index_of = {sequence.seq_id: index for index, sequence in enumerate(request.sequences)}
        self._outputs: list[SequenceOutput] = []
        self._arrived = asyncio.Event()

    @classmethod
    async def started(cls, loop: EngineLoop, request: GenerateRequest) -> OpenRequest:
        """Submits all sequences of a request, or none. Raises UserError if an id is in use."""
        opened = cls(loop, request)

        def submit(core: EngineCore) -> None:
            for sequence in request.sequences:
                if sequence.seq_id in core.scheduler.by_id:
                    raise UserError(f"rid {sequence.seq_id} is in use")
            for sequence in request.sequences:
                core.submit(sequence)

        for sequence in request.sequences:
            sequence.owner = opened
        await asyncio.wrap_future(loop.call(submit))
        return opened

    def index_of(self, output: SequenceOutput) -> int:
        """Index of the sequence in the request."""
        return self._index_of[output.sequence.seq_id]

    def put(self, output: SequenceOutput) -> None:
        """Adds an output of one of the sequences."""
        self._outputs.append(output)
        self._arrived.set()

    async def take(self) -> list[SequenceOutput]:
        """Waits for outputs and returns all that have arrived."""
        await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        self.num_running -= sum(output.finish is not None for output in outputs)
        return outputs

    async def outputs_until_gone(self, request: Request) -> AsyncIterator[SequenceOutput]:
        """Yields outputs until every sequence has ended or the client has disconnected.

        Afterwards `num_running` is above 0 only if the client disconnected.
        """
        gone = asyncio.ensure_future(disconnected(request.receive))
        try:
            while self.num_running:
                taking = asyncio.ensure_future(self.take())
                await asyncio.wait({taking, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    return
                for output in taking.result():
                    yield output
        finally:
            gone.cancel()

    def close(self) -> None:
        """Aborts the sequences that have not ended."""
        if any(sequence.finish is None for sequence in self.request.sequences):
            self._loop.abort(lambda core: self.request.sequences)


def deliver(outputs: list[SequenceOutput]) -> None:
    """Hands outputs to the requests that wait for them. Must run in the event loop."""
    for output in outputs:
        opened: OpenRequest = output.sequence.owner
        opened.put(output)


class GenerationRoutes:
    """Handlers of the endpoints that start, stop and pause generation."""

    def __init__(self, loop: EngineLoop, limits: RequestLimits) -> None:
        self._loop = loop
        self._limits = limits

    async def generate(self, request: Request, body: dict[str, Any]) -> Response:
        """/generate: one response at the end, or a stream of events; or the log-probs of a prompt."""
        if (scored := parse_score(body, self._limits)) is not None:
            return await self._score(scored)
        opened = await OpenRequest.started(self._loop, parse_generate(body, self._limits))
        if not opened.request.stream:
            return await self._wait_for_all(request, opened)
        if FRAMES in request.headers.get("accept", ""):
            return EventStream(self._frames(opened), on_close=opened.close, media_type=FRAMES)
        return EventStream(self._events(opened), on_close=opened.close)

    async def _score(self, request: ScoreRequest) -> Response:
        scoring = self._loop.call(
            lambda core: (core.score(request.tokens, first=request.first), core.version)
        )
        scores, version = await asyncio.wrap_future(scoring)
        return JSONResponse(request.response(scores, version=version))

    async def _events(self, opened: OpenRequest) -> AsyncIterator[bytes]:
        while opened.num_running:
            outputs = await opened.take()
            yield b"".join(encode_event(self._written(sequence_json, opened, output)) for output in outputs)
        yield END_OF_EVENTS

    async def _frames(self, opened: OpenRequest) -> AsyncIterator[bytes]:
        while opened.num_running:
            outputs = await opened.take()
            events = [self._written(packed_sequence, opened, output) for output in outputs]
            for frame in _frames_of(events):
                yield encode_frame(frame)
            if not opened.num_running:
                yield END_OF_FRAMES

    async def _wait_for_all(self, request: Request, opened: OpenRequest) -> Response:
        """Returns the response to a non-streaming request; status 499 if the client has disconnected."""
        finished: dict[int, dict[str, Any]] = {}
        try:
            async for output in opened.outputs_until_gone(request):
                if output.finish is not None:
                    event = self._written(sequence_json, opened, output)
                    finished[event["index"]] = event
        finally:
            opened.close()
        if opened.num_running:
            return Response(status_code=499)
        ordered = [finished[i] for i in range(len(finished))]
        return JSONResponse(ordered[0] if opened.request.single else ordered)

    def _written(
        self, write: Callable[..., dict[str, Any]], opened: OpenRequest, output: SequenceOutput
    ) -> dict[str, Any]:
        """Formats an output with `write`, one of the functions in `protocol`."""
        version = output.version_spans[-1][0] if output.version_spans else self._loop.load().weight_version
        return write(output, index=opened.index_of(output), version=version)

    async def abort(self, body: dict[str, Any]) -> Response:
        """/abort_request: ends the sequences of one request or of all, with the tokens they have."""
        rid = body.get("rid")
        if body.get("abort_all") is True:
            await asyncio.wrap_future(self._loop.abort(lambda core: core.all_sequences))
        elif isinstance(rid, str) and rid:
            await asyncio.wrap_future(
                self._loop.abort(lambda core: [s for s in core.all_sequences if rid in (s.seq_id, s.rid)])
            )
        else:
            raise UserError("give a request id in `rid`, or set `abort_all` to true")
        return success("")

    async def pause(self, body: dict[str, Any]) -> Response:
        """/pause_generation: no step runs until /continue_generation.

        `mode`: `abort` aborts all sequences, `retract` sends running sequences back to the queue, `in_place`
        leaves them in their rows.
        """
        mode = one_of(body, "mode", _PAUSE_MODES)

        def command(core: EngineCore) -> None:
            core.scheduler.paused = True
            if mode == "retract":
                core.preempt_all()

        await asyncio.wrap_future(self._loop.call(command))
        if mode == "abort":
            await asyncio.wrap_future(self._loop.abort(lambda core: core.all_sequences))
        return success(f"paused ({mode})")

    async def resume(self, body: dict[str, Any]) -> Response:
        """/continue_generation."""

        def command(core: EngineCore) -> None:
            core.scheduler.paused = False

        await asyncio.wrap_future(self._loop.call(command))
        return success("continued")


def _frames_of(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One frame for all events, unless they have routes: a frame of several would be too long."""
    has_routes = any("routed_experts" in event["meta_info"] for event in events)
    return [[event] for event in events] if has_routes else [events]


class EventStream(StreamingResponse):
    """Calls `on_close` when the response ends, even if the client disconnects before the first event."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        media_type: str = EVENTS,
    ) -> None:
        super().__init__(events, media_type=media_type)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()
