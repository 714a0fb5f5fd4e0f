"""A teacher's server as SGLang's API makes one look, with log-probs that follow from the tokens alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.support.served_app import served

Answer = Callable[[dict[str, Any], list[Any]], Any]


def logprob_of(before: list[int], token: int) -> float:
    """Of a token after these."""
    return -(1 + token + 0.125 * len(before))


class PlayedTeacher:
    """`async with teacher.running():`, then it responds at `url`."""

    def __init__(self, **facts: Any) -> None:
        """`facts`: its /server_info and /model_info."""
        self.facts = facts
        self.has_facts = True
        """False: it has neither route."""
        self.bodies: list[dict[str, Any]] = []
        self.answer: Answer = lambda body, entries: {"meta_info": {"input_token_logprobs": entries}}
        """Its response to a request, whose right entries are given; it may raise a web.HTTPException."""
        self.tokens_of_text: Callable[[str], list[int]] | None = None
        self.released = asyncio.Event()
        self.released.set()
        self.asked = asyncio.Event()
        self.url = ""

    @asynccontextmanager
    async def running(self, *, port: int = 0) -> AsyncIterator[PlayedTeacher]:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/model_info", self._info)
        async with served(app, port=port) as self.url:
            yield self

    async def _info(self, _: web.Request) -> web.Response:
        if not self.has_facts:
            raise web.HTTPNotFound(text="no such route")
        return web.json_response(self.facts)

    async def _generate(self, http: web.Request) -> web.Response:
        body = await http.json()
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0} and body["return_logprob"]
        if "text" in body:
            if self.tokens_of_text is None:
                raise web.HTTPBadRequest(text="this engine takes token ids, not text")
            tokens = self.tokens_of_text(body["text"])
        else:
            tokens = body["input_ids"]
            self.bodies.append(body)
            if tokens != [0, 1]:  # else it is the check
                self.asked.set()
                await self.released.wait()
        start = body["logprob_start_len"]
        entries: list[Any] = [[None, tokens[start], None]]
        entries += [
            [logprob_of(tokens[:i], tokens[i]), tokens[i], None] for i in range(start + 1, len(tokens))
        ]
        return web.json_response(self.answer(body, entries))
