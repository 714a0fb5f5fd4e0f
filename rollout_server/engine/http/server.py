"""HTTP around the engine: SGLang's paths, bodies and answers, so that one client drives either engine.

A thin shell: bodies are bounded and checked (protocol.py), sequences handed to the engine's thread (loop.py), weights to the updater. The
event loop owns requests; the engine's thread only ever posts finished reports to it. A client that disconnects takes
its sequences with it. Streams send whole sequences as they end (`--stream-interval` asks for more), because a chunk a token would
cost more than the token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from areal_like.errors import ArealError, EngineError, UserError, WeightSyncError
from areal_like.runtime.metrics import CONTENT_TYPE, PREFIX
from areal_like.weights.buckets import Bucket
from rollout_server.engine.core import EngineCore
from rollout_server.engine.http.protocol import GenerateRequest, Limits, answer, encode_event, parse_generate
from rollout_server.engine.loop import EngineLoop, Report
from rollout_server.engine.weight_updater import WeightUpdater

logger = logging.getLogger(__name__)

PAUSE_MODES = ("abort", "in_place", "retract")
DEFAULT_GROUP = "weight_update_group"
MAX_TIMEOUT_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What the HTTP side needs to know."""

    model_path: str
    max_body_bytes: int
    weights_timeout_s: float
    """Bound of joining a group and of one broadcast, where the request does not set one."""


@dataclass(eq=False)
class _Inbox:
    """Reports of one HTTP request, on their way from the engine's thread to the response."""

    open: int
    """Sequences that have not ended."""
    reports: list[Report] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self) -> list[Report]:
        """Waits for reports and returns all there are."""
        await self.arrived.wait()
        self.arrived.clear()
        reports, self.reports = self.reports, []
        self.open -= sum(report.finish is not None for report in reports)
        return reports


class EngineServer:
    """The application. `start` must run in the event loop before the first request."""

    def __init__(
        self,
        loop: EngineLoop,
        updater: WeightUpdater,
        limits: Limits,
        options: ServerOptions,
        *,
        model_type: str,
    ) -> None:
        self._loop = loop
        self._updater = updater
        self._limits = limits
        self._options = options
        self._model_type = model_type
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_EngineCollector(loop, updater))
        post: dict[str, Callable[[dict[str, Any]], Awaitable[Response]]] = {
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/begin_weight_update": self._begin_update,
            "/update_weights_from_distributed": self._update_from_distributed,
            "/receive_weights": self._receive_weights,
            "/end_weight_update": self._end_update,
            "/update_weights_from_disk": self._update_from_disk,
            "/flush_cache": self._flush,
        }
        get = {
            "/health": self._health,
            "/ready": self._health,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/metrics": self._metrics,
        }
        routes = [Route("/generate", self._generate, methods=["POST"])]
        routes += [Route(path, self._with_body(handler), methods=["POST"]) for path, handler in post.items()]
        routes += [Route(path, handler, methods=["GET"]) for path, handler in get.items()]
        routes.append(Route("/flush_cache", self._flush_get, methods=["GET"]))
        self.app = Starlette(routes=routes)

    # Generation

    @staticmethod
    def deliver(reports: list[Report]) -> None:
        """Hands reports to the requests that wait for them; runs in the event loop."""
        for report in reports:
            inbox: _Inbox = report.sequence.owner
            inbox.reports.append(report)
            inbox.arrived.set()

    async def _generate(self, request: Request) -> Response:
        try:
            work = parse_generate(await self._read(request), self._limits)
            inbox = _Inbox(open=len(work.sequences))
            for sequence in work.sequences:
                sequence.owner = inbox
            await asyncio.wrap_future(self._loop.call(lambda core: _submit(core, work)))
        except _BodyError as error:
            return _error(error.status, str(error))
        except UserError as error:
            return _error(400, str(error))
        except EngineError as error:
            return _error(500, str(error))
        if work.stream:
            return _Stream(self._stream(work, inbox), on_close=lambda: self._drop(work))
        return await self._whole(request, work, inbox)

    async def _stream(self, work: GenerateRequest, inbox: _Inbox) -> AsyncIterator[bytes]:
        places = {sequence.seq_id: i for i, sequence in enumerate(work.sequences)}
        while inbox.open:
            reports = await inbox.take()
            yield b"".join(encode_event(self._answer(work, places, report)) for report in reports)
        yield b"data: [DONE]\n\n"

    async def _whole(self, request: Request, work: GenerateRequest, inbox: _Inbox) -> Response:
        places = {sequence.seq_id: i for i, sequence in enumerate(work.sequences)}
        answers: dict[int, dict[str, Any]] = {}
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while inbox.open:
                taking = asyncio.ensure_future(inbox.take())
                await asyncio.wait({taking, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    return Response(status_code=499)
                for report in taking.result():
                    if report.finish is not None:
                        answers[places[report.sequence.seq_id]] = self._answer(work, places, report)
        finally:
            gone.cancel()
            self._drop(work)
        ordered = [answers[i] for i in range(len(answers))]
        return JSONResponse(ordered[0] if work.single else ordered)

    def _answer(self, work: GenerateRequest, places: dict[str, int], report: Report) -> dict[str, Any]:
        place = places[report.sequence.seq_id]
        version = report.version_spans[-1][0] if report.version_spans else self._loop.load().weight_version
        return answer(report, index=place, return_logprob=work.return_logprob[place], version=version)

    def _drop(self, work: GenerateRequest) -> None:
        """Ends what a request still has in the engine: its client has gone, or everything has ended anyway."""
        if any(sequence.finish is None for sequence in work.sequences):
            self._loop.abort(lambda core: work.sequences)

    async def _abort(self, body: dict[str, Any]) -> Response:
        rid = body.get("rid")
        if body.get("abort_all") is True:
            await asyncio.wrap_future(self._loop.abort(lambda core: core.all_sequences))
        elif isinstance(rid, str) and rid:
            await asyncio.wrap_future(
                self._loop.abort(lambda core: [s for s in core.all_sequences if rid in (s.seq_id, s.rid)])
            )
        else:
            raise UserError("name a request with `rid`, or set `abort_all` to true")
        return JSONResponse({"success": True, "message": ""})

    async def _pause(self, body: dict[str, Any]) -> Response:
        mode = body.get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise UserError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")

        def command(core: EngineCore) -> None:
            core.scheduler.paused = True
            if mode == "retract":
                core.retract()

        await asyncio.wrap_future(self._loop.call(command))
        if mode == "abort":
            await asyncio.wrap_future(self._loop.abort(lambda core: core.all_sequences))
        return JSONResponse({"success": True, "message": f"paused ({mode})"})

    async def _continue(self, body: dict[str, Any]) -> Response:
        def command(core: EngineCore) -> None:
            core.scheduler.paused = False

        await asyncio.wrap_future(self._loop.call(command))
        return JSONResponse({"success": True, "message": "continued"})

    # Weights

    async def _init_group(self, body: dict[str, Any]) -> Response:
        await self._updater.init_group(
            master_address=_text(body, "master_address"),
            master_port=_whole_number(body, "master_port", high=65535),
            rank=_whole_number(body, "rank_offset"),
            world_size=_whole_number(body, "world_size"),
            group_name=_text(body, "group_name", DEFAULT_GROUP),
            backend=_text(body, "backend", "nccl"),
            timeout_s=self._timeout(body),
        )
        return JSONResponse({"success": True, "message": "joined the weight group"})

    async def _destroy_group(self, body: dict[str, Any]) -> Response:
        await self._updater.destroy_group(_text(body, "group_name", DEFAULT_GROUP))
        return JSONResponse({"success": True, "message": "left the weight group"})

    async def _begin_update(self, body: dict[str, Any]) -> Response:
        await self._updater.begin()
        return JSONResponse({"success": True, "message": "weight update open"})

    async def _update_from_distributed(self, body: dict[str, Any]) -> Response:
        load_format = body.get("load_format")
        if load_format not in (None, "flattened_bucket"):
            raise UserError(f"load_format must be null or flattened_bucket, got {load_format!r}")
        found = await self._updater.receive(
            Bucket.from_dict(body),
            group_name=_text(body, "group_name", DEFAULT_GROUP),
            flattened=load_format is not None,
            version=_version(body),
            timeout_s=self._timeout(body),
        )
        return JSONResponse({"success": True, "message": "received", "checksum": found})

    async def _receive_weights(self, body: dict[str, Any]) -> Response:
        buckets = body.get("buckets")
        if not isinstance(buckets, list) or not all(isinstance(bucket, dict) for bucket in buckets):
            raise UserError("buckets must be a list of objects")
        found = await self._updater.receive_all(
            [Bucket.from_dict(bucket) for bucket in buckets],
            group_name=_text(body, "group_name", DEFAULT_GROUP),
            timeout_s=self._timeout(body),
        )
        return JSONResponse({"success": True, "message": "received", "checksums": found})

    async def _end_update(self, body: dict[str, Any]) -> Response:
        stall_s = await self._updater.end(version=_version(body), recompute=_recompute(body))
        return JSONResponse({"success": True, "message": "active", "stall_s": stall_s})

    async def _update_from_disk(self, body: dict[str, Any]) -> Response:
        path, version = _text(body, "model_path"), _version(body)
        stall_s = await self._updater.from_disk(path, version=version, recompute=_recompute(body))
        return JSONResponse({"success": True, "message": "active", "stall_s": stall_s})

    # State

    async def _flush(self, body: dict[str, Any]) -> Response:
        await asyncio.wrap_future(self._loop.call(lambda core: core.flush()))
        return JSONResponse({"success": True, "message": "cache flushed"})

    async def _flush_get(self, request: Request) -> Response:
        return await self._flush({})

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse(
            "" if self._loop.alive else "the engine has stopped", status_code=200 if self._loop.alive else 503
        )

    async def _model_info(self, request: Request) -> Response:
        return JSONResponse(
            {
                "model_path": self._options.model_path,
                "tokenizer_path": self._options.model_path,
                "is_generation": True,
                "model_type": self._model_type,
                "weight_version": self._loop.load().weight_version,
            }
        )

    async def _server_info(self, request: Request) -> Response:
        load = {**dataclasses.asdict(self._loop.load()), **_update_numbers(self._updater)}
        return JSONResponse(
            {
                "engine": "embedded",
                **self._updater.facts(),
                "model_path": self._options.model_path,
                "context_length": self._limits.context_length,
                "vocab_size": self._limits.vocab_size,
                "eos_token_ids": list(self._limits.eos_token_ids),
                "load": load,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE)

    # Plumbing

    def _with_body(
        self, handler: Callable[[dict[str, Any]], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(await self._read(request))
            except _BodyError as error:
                return _error(error.status, str(error))
            except (UserError, WeightSyncError) as error:
                return _error(400, str(error))
            except ArealError as error:
                return _error(500, str(error))

        return endpoint

    async def _read(self, request: Request) -> dict[str, Any]:
        """The body as an object, never more of it than `max_body_bytes`."""
        content = bytearray()
        try:
            async for piece in request.stream():
                content += piece
                if len(content) > self._options.max_body_bytes:
                    raise _BodyError(
                        413,
                        f"the body is larger than {self._options.max_body_bytes} bytes (--max-body-bytes)",
                    )
        except ClientDisconnect:
            raise _BodyError(400, "the client left before its body was complete") from None
        try:
            body = json.loads(content) if content else {}
        except (ValueError, RecursionError):
            raise _BodyError(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise _BodyError(400, "the body must be a JSON object")
        return body

    def _timeout(self, body: dict[str, Any]) -> float:
        timeout_s = body.get("timeout_s", self._options.weights_timeout_s)
        if (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, (int, float))
            or not 0 < timeout_s <= MAX_TIMEOUT_S
        ):
            raise UserError(
                f"timeout_s must be a number of seconds up to {MAX_TIMEOUT_S:g}, got {timeout_s!r}"
            )
        return float(timeout_s)


class _Stream(StreamingResponse):
    """Calls `on_close` however the response ends, also if its client left before the first event was asked for."""

    def __init__(self, events: AsyncIterator[bytes], *, on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


class _BodyError(UserError):
    """A body that cannot be read at all."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _submit(core: EngineCore, work: GenerateRequest) -> None:
    for sequence in work.sequences:
        if sequence.seq_id in core.scheduler.by_id:
            raise UserError(f"rid {sequence.seq_id} is in use")
    for sequence, index in zip(work.sequences, work.sample_index, strict=True):
        core.submit(sequence, index=index)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, message: str) -> Response:
    return JSONResponse(
        {"success": False, "message": message, "error": {"message": message, "code": status}},
        status_code=status,
    )


def _text(body: dict[str, Any], name: str, default: str = "") -> str:
    value = body.get(name, default)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} must be a non-empty string, got {value!r}")
    return value


def _whole_number(body: dict[str, Any], name: str, *, high: int = 1 << 20) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value <= high:
        raise UserError(f"{name} must be an integer between 0 and {high}, got {value!r}")
    return value


def _version(body: dict[str, Any]) -> str:
    """`weight_version` as a string; empty where the body has none."""
    value = body.get("weight_version")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise UserError(f"weight_version must be a string, got {value!r}")
    return "" if value is None else str(value)


def _recompute(body: dict[str, Any]) -> bool:
    running = body.get("running", "recompute")
    if running not in ("recompute", "keep"):
        raise UserError(f"running must be recompute or keep, got {running!r}")
    return bool(running == "recompute")


def _update_numbers(updater: WeightUpdater) -> dict[str, float]:
    return {
        "updates": updater.num_updates,
        "failed_updates": updater.num_failures,
        "update_s": updater.update_s,
    }


class _EngineCollector(Collector):
    """Reads the engine's own counters when scraped, instead of counting everything twice."""

    def __init__(self, loop: EngineLoop, updater: WeightUpdater) -> None:
        self._loop = loop
        self._updater = updater

    def collect(self) -> Iterable[Metric]:
        """All series."""
        load, updates = self._loop.load(), _update_numbers(self._updater)
        return self._families(
            counters=[
                ("engine_generated_tokens", "Tokens sampled", load.generated_tokens),
                ("engine_prefilled_tokens", "Context tokens computed", load.prefilled_tokens),
                (
                    "engine_shared_prefixes",
                    "Sequences whose context was already computed",
                    load.shared_prefixes,
                ),
                ("engine_steps", "Decode steps", load.steps),
                ("engine_busy_seconds", "Time inside steps", load.busy_s),
                ("engine_idle_seconds", "Time with no runnable sequence", load.idle_s),
                (
                    "engine_stall_seconds",
                    "Time from stopping for new weights to the next token",
                    load.stall_s,
                ),
                ("engine_weight_updates", "Weight updates activated", updates["updates"]),
                ("engine_weight_update_failures", "Weight updates refused", updates["failed_updates"]),
                (
                    "engine_weight_update_seconds",
                    "Time from opening updates to activating them",
                    updates["update_s"],
                ),
            ],
            gauges=[
                ("engine_running", "Sequences being decoded", load.running),
                ("engine_waiting", "Sequences in the queue", load.waiting),
                ("engine_kv_rows", "KV rows", load.rows),
                ("engine_kv_rows_used", "KV rows in use", load.running),
                ("engine_paused", "1 while generation is paused", int(load.paused)),
                (
                    "engine_weight_version",
                    "Active version, -1 if it is not a number",
                    _as_number(load.weight_version),
                ),
            ],
        )

    @staticmethod
    def _families(
        *, counters: list[tuple[str, str, float]], gauges: list[tuple[str, str, float]]
    ) -> Iterator[Metric]:
        for name, doc, value in counters:
            yield CounterMetricFamily(f"{PREFIX}_{name}", doc, value=value)
        for name, doc, value in gauges:
            yield GaugeMetricFamily(f"{PREFIX}_{name}", doc, value=value)


def _as_number(version: str) -> int:
    return int(version) if version.isdigit() else -1
