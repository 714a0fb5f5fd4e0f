"""Failures of single requests in a batch, against a stub that fails as SGLang does, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from areal_like.errors import EngineError, EngineTimeoutError, PromptRefusedError
from areal_like.trajectory import FinishReason
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Generation, Sampling
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.served_app import served
from tests.support.waiting import HANG_LIMIT_S

TOO_LONG, ODD, CRASH, SLOW, SILENT = 1000, 1001, 1002, 1003, 1004
"""First tokens of prompts that the stub refuses, answers with an unknown finish type, breaks its connection
for, samples for ever, and never begins to sample."""


class StubEngine:
    """Answers /generate as SGLang answers a streamed batch; a sequence gets the token 7 twice."""

    def __init__(self) -> None:
        self.requests: list[list[str]] = []
        self.aborted: list[str] = []
        self.aborts_are_ignored = False
        self._changed = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        return app

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        self._changed.set()
        return web.json_response({})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        rids, prompts = body["rid"], body["input_ids"]
        self.requests.append(rids)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        first = [prompt[0] for prompt in prompts]
        # SGLang checks prompts one after the other, so those before the bad one may have an answer.
        for index, token in enumerate(first):
            if token == TOO_LONG:
                await _send(response, {"error": {"message": "The input is longer than the context length"}})
                return response
            if token == CRASH and request.transport is not None:
                request.transport.close()
                return response
            if token in (SLOW, SILENT):
                continue
            kind = "boredom" if token == ODD else "length"
            await _send(response, _event(index, [7, 7], {"type": kind, "length": 2}))
        running = [index for index, token in enumerate(first) if token in (SLOW, SILENT)]
        while running:
            ended = [index for index in running if rids[index] in self.aborted]
            if not ended or self.aborts_are_ignored:
                await self._changed.wait()
                self._changed.clear()
                continue
            for index in ended:
                running.remove(index)
                tokens = [7] * (5 if first[index] == SLOW else 0)
                await _send(response, _event(index, tokens, {"type": "abort", "message": "Aborted"}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _event(index: int, tokens: list[int], reason: dict[str, Any]) -> dict[str, Any]:
    meta = {
        "finish_reason": reason,
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "weight_version": "3",
    }
    return {"index": index, "output_ids": tokens, "meta_info": meta}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@asynccontextmanager
async def stubbed() -> AsyncIterator[tuple[StubEngine, EngineClient]]:
    stub = StubEngine()
    async with served(stub.app()) as url, EngineClient(url) as client:
        yield stub, client


async def generate(
    client: EngineClient, first_tokens: list[int], *, timeout_s: float = HANG_LIMIT_S
) -> list[Generation | BaseException]:
    """The outcomes of requests that start in one turn of the loop."""
    sampling = Sampling(max_new_tokens=8)
    asked = [
        client.generate([token, 5], sampling=sampling, rid=f"1.{index}.0", timeout_s=timeout_s)
        for index, token in enumerate(first_tokens)
    ]
    return await asyncio.gather(*asked, return_exceptions=True)


async def until_left(client: EngineClient, num_requests: int) -> None:
    """Until only so many have no answer."""
    await asyncio.sleep(0)  # they have been asked
    while client.num_generating != num_requests:
        await asyncio.sleep(0.01)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            await body()

    moved_clock.run(limited())


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [(TOO_LONG, PromptRefusedError, "longer than the context"), (CRASH, EngineError, "was lost")],
)
def test_one_bad_of_64_fails_alone(bad: int, error: type[EngineError], message: str) -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            outcomes = await generate(client, [*range(10, 50), bad, *range(60, 83)])
            assert Counter(type(outcome) for outcome in outcomes) == {Generation: 63, error: 1}
            assert type(outcomes[40]) is error and message in str(outcomes[40])
            batch, *alone = stub.requests
            assert len(batch) == 64 and {len(rids) for rids in alone} == {1}
            assert len(alone) <= 64 and not {rid for rids in alone for rid in rids} & set(batch)

    run(body)


def test_orphans_of_a_broken_batch_are_aborted() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            outcomes = await generate(client, [TOO_LONG, 10, 11])
            assert [type(outcome) for outcome in outcomes] == [PromptRefusedError, Generation, Generation]
            while len(stub.aborted) < 3:
                await asyncio.sleep(0.01)
            assert stub.aborted == stub.requests[0]

    run(body)


def test_an_unknown_finish_type_fails_alone() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            first, odd, last = await generate(client, [10, ODD, 11])
            assert isinstance(first, Generation) and isinstance(last, Generation)
            assert type(odd) is EngineError and "boredom" in str(odd)
            assert len(stub.requests) == 1, "the others were answered in the same stream"

    run(body)


def test_a_time_out_keeps_the_partial_tokens() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            asked = asyncio.create_task(generate(client, [10, SLOW, SILENT], timeout_s=100))
            await until_left(client, 2)
            advance(100)
            quick, slow, silent = await asked
            assert isinstance(quick, Generation) and quick.finish_reason is FinishReason.LENGTH
            assert isinstance(slow, Generation) and slow.finish_reason is FinishReason.TIMEOUT
            assert (slow.output_ids.tolist(), slow.versions.tolist()) == ([7] * 5, [3] * 5)
            assert type(silent) is EngineTimeoutError and "100 s (rollout.sample_timeout_s)" in str(silent)
            assert len(stub.requests) == 1 and stub.aborted == ["1.1.0;", "1.2.0;"]

    run(body)


def test_an_engine_that_ignores_aborts_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.policy.batcher._ABORT_GRACE_S", 100)

    async def body() -> None:
        async with stubbed() as (stub, client):
            stub.aborts_are_ignored = True
            asked = asyncio.create_task(generate(client, [10, SLOW, SLOW], timeout_s=100))
            await until_left(client, 2)
            advance(100)
            while len(stub.aborted) < 2:
                await asyncio.sleep(0.01)
            advance(100)
            quick, *slow = await asked
            assert isinstance(quick, Generation)
            assert {type(outcome) for outcome in slow} == {EngineTimeoutError}
            assert len(stub.requests) == 1, "a time-out is not sent again"
            assert client.num_generating == 0
            async with asyncio.timeout(HANG_LIMIT_S):  # the stream that the engine keeps open is closed
                while client._batcher._tasks:
                    await asyncio.sleep(0.01)

    run(body)


def test_each_of_a_batch_has_its_own_time_limit() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            short = asyncio.create_task(generate(client, [SLOW], timeout_s=100))
            sampling = Sampling(max_new_tokens=8)
            long = asyncio.create_task(client.generate([SLOW, 5], sampling=sampling, rid="2", timeout_s=300))
            unlimited = asyncio.create_task(client.generate([SLOW, 5], sampling=sampling, rid="3"))
            while not stub.requests:
                await asyncio.sleep(0.01)
            advance(100)
            (first,) = await short
            assert isinstance(first, Generation) and first.finish_reason is FinishReason.TIMEOUT
            assert not long.done()
            advance(200)
            assert (await long).finish_reason is FinishReason.TIMEOUT
            assert len(stub.requests) == 1 and stub.aborted == ["1.0.0;", "2;"]
            assert not unlimited.done()
            await client.abort("3")
            assert (await unlimited).finish_reason is FinishReason.ABORT

    run(body)


def test_a_request_that_was_sent_again_can_be_aborted() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            asked = asyncio.create_task(generate(client, [TOO_LONG, SLOW]))
            while len(stub.requests) < 3:
                await asyncio.sleep(0.01)
            await client.abort("1.1.0")
            _, slow = await asked
            assert isinstance(slow, Generation) and slow.finish_reason is FinishReason.ABORT

    run(body)


def test_closing_fails_requests_that_are_sent_again() -> None:
    async def body() -> None:
        async with stubbed() as (stub, client):
            asked = asyncio.create_task(generate(client, [TOO_LONG, SLOW]))
            while len(stub.requests) < 3:
                await asyncio.sleep(0.01)
            await client.close()
            _, slow = await asked
            assert isinstance(slow, EngineError) and "closed" in str(slow)

    run(body)
