"""The endpoints of generation: /generate, and abort, pause and continue.

The event loop owns requests. The engine's thread posts outputs to the event loop (`deliver`), each to the
inbox of its request. If a client disconnects, its sequences are aborted. A stream sends each sequence as one
chunk when it ends, because one chunk per token would cost more than sampling the token; `--stream-interval`
asks for smaller chunks. A client that accepts the packed form gets its stream in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from areal_like.errors import UserError
from rollout_server.engine.core import EngineCore
from rollout_server.engine.http.generate_request import GenerateRequest, RequestLimits, parse_generate
from rollout_server.engine.http.protocol import (
    END_OF_STREAM,
    encode_event,
    pack_events,
    packed_sequence,
    sequence_json,
    success,
)
from rollout_server.engine.http.score_request import ScoreRequest, parse_score
from rollout_server.engine.loop import EngineLoop, SequenceOutput
from rollout_server.engine.scoring import score
from rollout_server.packed_generate import END_OF_FRAMES, MEDIA_TYPE

PAUSE_MODES = ("abort", "in_place", "retract")


@dataclass(eq=False)
class Inbox:
    """Outputs of one HTTP request, on their way from the engine's thread to the response."""

    num_open: int
    """Sequences that have not ended."""
    outputs: list[SequenceOutput] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self) -> list[SequenceOutput]:
        """Waits for outputs and returns all that have arrived."""
        await self.arrived.wait()
        self.arrived.clear()
        outputs, self.outputs = self.outputs, []
        self.num_open -= sum(output.finish is not None for output in outputs)
        return outputs


def deliver(outputs: list[SequenceOutput]) -> None:
    """Hands outputs to the requests that wait for them. Must run in the event loop."""
    for output in outputs:
        inbox: Inbox = output.sequence.owner
        inbox.outputs.append(output)
        inbox.arrived.set()


class GenerationRoutes:
    """Handlers of the endpoints that start, stop and pause generation."""

    def __init__(self, loop: EngineLoop, limits: RequestLimits) -> None:
        self._loop = loop
        self._limits = limits

    async def generate(self, request: Request, body: dict[str, Any]) -> Response:
        """/generate: one response at the end, or a stream of events; or the log-probs of a prompt."""
        if (scored := parse_score(body, self._limits)) is not None:
            return await self._score(scored)
        work = parse_generate(body, self._limits)
        inbox = Inbox(num_open=len(work.sequences))
        for sequence in work.sequences:
            sequence.owner = inbox
        await asyncio.wrap_future(self._loop.call(lambda core: submit(core, work)))
        if work.stream:
            close = partial(self._abort_unfinished, work)
            if MEDIA_TYPE in request.headers.get("accept", ""):
                return EventStream(self._frames(work, inbox), on_close=close, media_type=MEDIA_TYPE)
            return EventStream(self._events(work, inbox), on_close=close)
        return await self._wait_for_all(request, work, inbox)

    async def _score(self, request: ScoreRequest) -> Response:
        scoring = self._loop.call(
            lambda core: (score(core, request.tokens, first=request.first), core.version)
        )
        scores, version = await asyncio.wrap_future(scoring)
        return JSONResponse(request.answer(scores, version=version))

    async def _events(self, work: GenerateRequest, inbox: Inbox) -> AsyncIterator[bytes]:
        index_of = {sequence.seq_id: i for i, sequence in enumerate(work.sequences)}
        while inbox.num_open:
            outputs = await inbox.take()
            yield b"".join(
                encode_event(self._written(sequence_json, work, index_of, output)) for output in outputs
            )
        yield END_OF_STREAM

    async def _frames(self, work: GenerateRequest, inbox: Inbox) -> AsyncIterator[bytes]:
        index_of = {sequence.seq_id: i for i, sequence in enumerate(work.sequences)}
        while inbox.num_open:
            outputs = await inbox.take()
            events = [self._written(packed_sequence, work, index_of, output) for output in outputs]
            yield pack_events(events) + (b"" if inbox.num_open else END_OF_FRAMES)

    async def _wait_for_all(self, request: Request, work: GenerateRequest, inbox: Inbox) -> Response:
        """The response of a request without a stream; status 499 if the client has disconnected."""
        index_of = {sequence.seq_id: i for i, sequence in enumerate(work.sequences)}
        finished: dict[int, dict[str, Any]] = {}
        disconnect = asyncio.ensure_future(disconnected(request))
        try:
            while inbox.num_open:
                taking = asyncio.ensure_future(inbox.take())
                await asyncio.wait({taking, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    return Response(status_code=499)
                for output in taking.result():
                    if output.finish is not None:
                        event = self._written(sequence_json, work, index_of, output)
                        finished[event["index"]] = event
        finally:
            disconnect.cancel()
            self._abort_unfinished(work)
        ordered = [finished[i] for i in range(len(finished))]
        return JSONResponse(ordered[0] if work.single else ordered)

    def _written(
        self,
        write: Callable[..., dict[str, Any]],
        work: GenerateRequest,
        index_of: dict[str, int],
        output: SequenceOutput,
    ) -> dict[str, Any]:
        """What `write`, one of the functions in `protocol`, makes of an output."""
        index = index_of[output.sequence.seq_id]
        version = output.version_spans[-1][0] if output.version_spans else self._loop.load().weight_version
        return write(output, index=index, return_logprob=work.return_logprob[index], version=version)

    def _abort_unfinished(self, work: GenerateRequest) -> None:
        """Aborts a closed request; does nothing if all its sequences have ended."""
        if any(sequence.finish is None for sequence in work.sequences):
            self._loop.abort(lambda core: work.sequences)

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
        mode = body.get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise UserError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")

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


class EventStream(StreamingResponse):
    """Calls `on_close` when the response ends, also if the client disconnects before the first event."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None],
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(events, media_type=media_type)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def submit(core: EngineCore, work: GenerateRequest) -> None:
    """Submits all sequences of a request or none. Raises UserError if an id is in use."""
    for sequence in work.sequences:
        if sequence.seq_id in core.scheduler.by_id:
            raise UserError(f"rid {sequence.seq_id} is in use")
    for sequence, index in zip(work.sequences, work.sample_index, strict=True):
        core.submit(sequence, index=index)


async def disconnected(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
