"""The engine's HTTP application, with SGLang's paths, bodies and responses, so one client works with both.

This module contains the table of routes and the endpoints that read the engine's state. The other endpoints
are in `generation_routes`, `chat` and `weight_routes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from areal_like.errors import ArealError, UserError, WeightSyncError
from areal_like.http.bodies import parse_object, parse_packed_object
from areal_like.http.streams import FRAMES
from areal_like.runtime.metrics import CONTENT_TYPE
from areal_like.wire.routes import RoutesShape
from rollout_server.engine.http.chat import ChatRoutes
from rollout_server.engine.http.generate_request import RequestLimits
from rollout_server.engine.http.generation_routes import GenerationRoutes
from rollout_server.engine.http.protocol import failure, success
from rollout_server.engine.http.weight_routes import WeightRoutes
from rollout_server.engine.loop import EngineLoop
from rollout_server.engine.metrics import EngineCollector, numbers, watch_latencies
from rollout_server.engine.options import ProcessOptions
from rollout_server.engine.weights.updater import WeightUpdater

Endpoint = Callable[[Request], Awaitable[Response]]
BodyHandler = Callable[[dict[str, Any]], Awaitable[Response]]


class EngineServer:
    """Builds the engine's HTTP application (`app`). Start the engine's thread before serving it."""

    def __init__(
        self,
        loop: EngineLoop,
        updater: WeightUpdater,
        limits: RequestLimits,
        options: ProcessOptions,
        *,
        model_type: str,
        routes_shape: RoutesShape | None = None,
    ) -> None:
        """`routes_shape`: of the routes in responses; None: there are none."""
        self._loop = loop
        self._updater = updater
        self._limits = limits
        self._options = options
        self._model_type = model_type
        self._routes_shape = routes_shape
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(EngineCollector(loop, updater))
        watch_latencies(loop, self._registry)
        generation = GenerationRoutes(loop, limits)
        chat = ChatRoutes(loop, limits, model_path=options.model_path)
        weights = WeightRoutes(updater, options)
        post: dict[str, BodyHandler] = {
            "/abort_request": generation.abort,
            "/pause_generation": generation.pause,
            "/continue_generation": generation.resume,
            "/init_weights_update_group": weights.init_group,
            "/destroy_weights_update_group": weights.destroy_group,
            "/begin_weight_update": weights.begin,
            "/update_weights_from_distributed": weights.receive_bucket,
            "/receive_weights": weights.receive_all,
            "/end_weight_update": weights.end,
            "/update_weights_from_disk": weights.load_from_disk,
            "/flush_cache": self._flush_cache,
        }
        get: dict[str, Endpoint] = {
            "/flush_cache": self._flush_cache_get,
            "/health": self._health,
            "/ready": self._health,
            "/model_info": self._model_info,
            "/get_model_info": self._model_info,
            "/server_info": self._server_info,
            "/get_server_info": self._server_info,
            "/metrics": self._metrics,
            "/v1/models": chat.models,
        }
        generate = self._with_request_and_body(generation.generate, takes_packed=True)
        routes = [Route("/generate", generate, methods=["POST"])]
        routes += [Route("/v1/chat/completions", chat.complete, methods=["POST"])]
        routes += [Route(path, self._with_body(handler), methods=["POST"]) for path, handler in post.items()]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()]
        self.app = Starlette(routes=routes)

    def _with_body(self, handler: BodyHandler) -> Endpoint:
        return self._with_request_and_body(lambda request, body: handler(body))

    def _with_request_and_body(
        self,
        handler: Callable[[Request, dict[str, Any]], Awaitable[Response]],
        *,
        takes_packed: bool = False,
    ) -> Endpoint:
        """Wraps a handler in an endpoint that reads the body and turns our exceptions into responses."""

        async def endpoint(request: Request) -> Response:
            try:
                is_packed = takes_packed and request.headers.get("content-type") == FRAMES
                body = (parse_packed_object if is_packed else parse_object)(await request.body())
                return await handler(request, body)
            except (UserError, WeightSyncError) as error:
                return failure(400, str(error))
            except ArealError as error:
                return failure(500, str(error))

        return endpoint

    async def _flush_cache(self, body: dict[str, Any]) -> Response:
        await asyncio.wrap_future(self._loop.call(lambda core: core.flush_prefix_cache()))
        return success("cache flushed")

    async def _flush_cache_get(self, request: Request) -> Response:
        return await self._flush_cache({})

    async def _health(self, request: Request) -> Response:
        if self._loop.alive:
            return PlainTextResponse("")
        return PlainTextResponse("the engine has stopped", status_code=503)

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
        return JSONResponse(
            {
                "engine": "embedded",
                **self._updater.device_facts(),
                "authenticates_store": True,
                "model_path": self._options.model_path,
                "context_length": self._limits.context_length,
                "vocab_size": self._limits.vocab_size,
                "eos_token_ids": list(self._limits.eos_token_ids),
                **({} if self._routes_shape is None else {"routes_shape": list(self._routes_shape)}),
                "load": numbers(self._loop, self._updater),
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE)
