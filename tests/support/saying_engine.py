"""An engine at a URL that says what a test wants.

It has the part of SGLang's HTTP API that a job without pushes uses.

    async with saying_engine(SayingPolicy(renderer)) as url:
        ...  # a rollout server with rollout.engine=sglang rollout.sglang.url={url}
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from rollout_server.policy.generation import Generation, Sampling
from tests.support.served_app import Handler, served
from tests.support.session_server import SayingPolicy

_MAX_BODY_BYTES = 1 << 24
_VERSION = "0"
_ANSWERS: dict[str, Any] = {
    "/ready": {},
    "/server_info": {"tp_size": 1, "device": "cpu"},
    "/model_info": {"weight_version": _VERSION},
    "/v1/loads": {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]},
    "/metrics": {},
    "/abort_request": {},
    "/end_weight_update": {},
    "/update_weights_from_disk": {},
    "/weights_checker": {"per_engine_checksum": "0"},
}


@asynccontextmanager
async def saying_engine(policy: SayingPolicy) -> AsyncIterator[str]:
    """Serves the policy on loopback; gives the URL."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    for path, answer in _ANSWERS.items():
        app.router.add_route("*", path, _answering(answer))
    app.router.add_post("/generate", _generating(policy))
    async with served(app) as url:
        yield url


def _answering(answer: Any) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    return handle


def _generating(policy: SayingPolicy) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for index, (prompt, params) in enumerate(
            zip(body["input_ids"], body["sampling_params"], strict=True)
        ):
            generation = await policy.generate(
                prompt, sampling=Sampling(max_new_tokens=params["max_new_tokens"])
            )
            event = _event(index, generation, num_prompt_tokens=len(prompt))
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await stream.write(b"data: [DONE]\n\n")
        return stream

    return handle


def _event(index: int, generation: Generation, *, num_prompt_tokens: int) -> dict[str, Any]:
    """The last event of a sequence."""
    tokens = generation.output_ids.tolist()
    return {
        "index": index,
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": generation.finish_reason.value},
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": 0,
            "output_token_logprobs": [
                [logprob, token, None]
                for token, logprob in zip(tokens, generation.logprobs.tolist(), strict=True)
            ],
            "weight_versions": [{"version": _VERSION, "start": 0, "end": len(tokens)}],
        },
    }
