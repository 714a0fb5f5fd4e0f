"""A stand-in for SGLang: its HTTP API as 0.5.23 has it, with its rules for adapters and its routes.

It samples nothing: a request returns the tokens that `end` gives it, and the test looks at what was asked.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from tests.support.served_app import served


@dataclass(eq=False)
class Request:
    """One sequence at the engine."""

    rid: str
    lora_path: str | None
    cache_salt: str
    end: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Set its result to the type of the finish reason."""


class PlayedSglang:
    """Serves `url` inside `running`."""

    def __init__(self, *, max_loaded: int = 0, routes_shape: tuple[int, int, int] | None = None) -> None:
        """`max_loaded`: `--max-loaded-loras`. `routes_shape`: layers, experts per token and experts of its
        model, with `--enable-return-routed-experts`; None: without it."""
        self.routes_shape = routes_shape
        self.forged_routes: str | None = None
        """What it returns as routes, if they are not to be right."""
        self.num_routed = 0
        """Requests that asked for routes."""
        self.max_loaded = max_loaded
        self.loaded: dict[str, dict[str, Tensor]] = {}
        """Adapters by name: the tensors in their folders when they were loaded."""
        self.configs: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        """Running sequences."""
        self.scored: list[dict[str, Any]] = []
        self.refuses_loads = False
        self.url = ""

    def running_with(self, name: str | None) -> list[Request]:
        return [request for request in self.requests if request.lora_path == name]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[PlayedSglang]:
        app = web.Application()
        app.router.add_post("/load_lora_adapter", self._load)
        app.router.add_post("/unload_lora_adapter", self._unload)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/model_info", self._info)
        async with served(app) as self.url:
            yield self

    def _routes(self, num_tokens: int) -> str:
        """Base64 of int32[tokens, layers, experts per token]: token t uses the experts t, t + 1, ..."""
        assert self.routes_shape is not None
        num_layers, num_chosen, num_experts = self.routes_shape
        token_T = np.arange(num_tokens)[:, None, None]
        chosen = (token_T + np.arange(num_chosen) + np.zeros((num_layers, 1), np.int64)) % num_experts
        return base64.b64encode(chosen.astype("<i4").tobytes()).decode()

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"tp_size": 2, "device": "cuda", "weight_version": "0"})

    async def _load(self, http: web.Request) -> web.Response:
        body = await http.json()
        assert body.keys() <= {"lora_name", "lora_path", "pinned", "lora_id"}  # it knows no other field
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.loaded or self.refuses_loads:
            return self._result(f"Failed to load LoRA adapter {name} because it is already loaded")
        assert len(self.loaded) < self.max_loaded, "SGLang would evict an adapter, and wait for its requests"
        self.loaded[name] = load_file(path / "adapter_model.safetensors")
        self.configs[name] = json.loads((path / "adapter_config.json").read_text())
        return self._result("")

    async def _unload(self, http: web.Request) -> web.Response:
        body = await http.json()
        assert body.keys() == {"lora_name"}
        name = body["lora_name"]
        if name not in self.loaded:
            return self._result(f"LoRA with name {name} does not exist. Loaded LoRAs: dict_keys([])")
        assert not self.running_with(name), "SGLang would hold its lock until these requests have ended"
        del self.loaded[name]
        return self._result("")

    @staticmethod
    def _result(error: str) -> web.Response:
        return web.json_response(
            {"success": not error, "error_message": error, "loaded_adapters": {}},
            status=400 if error else 200,
        )

    async def _abort(self, http: web.Request) -> web.Response:
        body = await http.json()
        for request in list(self.requests):
            is_meant = body.get("abort_all") or request.rid.startswith(body["rid"])
            if is_meant and not request.end.done():
                request.end.set_result("abort")
        return web.json_response({})

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if "rid" not in body:
            self.scored.append(body)
            entries = [[-0.5, 1, None]] * (len(body["input_ids"]) - body["logprob_start_len"])
            meta = {"input_token_logprobs": entries, "weight_version": "0"}
            return web.json_response({"meta_info": meta})
        names = body.get("lora_path") or [None] * len(body["rid"])
        for name in names:
            if name is not None and name not in self.loaded:
                error = {"error": {"message": f"Got LoRA adapter that has never been loaded: {name}"}}
                return web.json_response(error, status=400)
        salts = body["cache_salt"]
        assert isinstance(body.get("return_routed_experts", False), bool)  # it takes no list here
        self.num_routed += bool(body.get("return_routed_experts"))
        requests = [Request(*each) for each in zip(body["rid"], names, salts, strict=True)]
        self.requests += requests
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(http)

        async def finish(index: int, request: Request) -> None:
            kind = await request.end
            self.requests.remove(request)
            event = {
                "index": index, "output_ids": [7, 8, 9],
                "meta_info": {
                    "finish_reason": {"type": kind, "length": 3, "message": "Aborted"},
                    "prompt_tokens": 1, "cached_tokens": 0,
                    "output_token_logprobs": [[-1.0, token, None] for token in (7, 8, 9)],
                    # SGLang's own version never changes: no weights are pushed into it.
                    "weight_versions": [{"version": "0", "start": 0, "end": 3}],
                },
            }  # fmt: skip
            if body.get("return_routed_experts") and self.routes_shape is not None:
                num_tokens = len(body["input_ids"][index]) + 3 - 1
                event["meta_info"]["routed_experts"] = self.forged_routes or self._routes(num_tokens)
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        await asyncio.gather(*(finish(index, request) for index, request in enumerate(requests)))
        await stream.write(b"data: [DONE]\n\n")
        return stream
