"""/v1/completions and /inference/v1/generate of sessions, over HTTP, with log-probs of the real engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI

from rollout_server.sessions.open_session import OpenSession
from tests.support.engine_harness import Engine, load_model, reference_logprobs
from tests.support.scripted_policy import (
    Plane,
    Say,
    Script,
    check_logprobs,
    finished,
    segments,
    serving_plane,
)


@asynccontextmanager
async def opened(
    engine: Engine, script: Script, **options: Any
) -> AsyncIterator[tuple[Plane, OpenSession, httpx.AsyncClient]]:
    async with engine.client() as client, serving_plane() as plane:
        session = plane.script(client, script, **options)
        async with httpx.AsyncClient(base_url=plane.base_url(session), timeout=None) as http:
            yield plane, session, http


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_completions_continue_token_by_token(engine: Engine, models: tuple[Path, Path]) -> None:
    async def body() -> None:
        async with opened(engine, ["abab 12", "more", "other"]) as (plane, session, http):
            first = await post(
                http, "completions", prompt=[5, 6, 7], logprobs=5, return_token_ids=True, temperature=0.1
            )
            choice = first["choices"][0]
            assert choice["text"] == "abab 12" and choice["finish_reason"] == "stop"
            assert choice["prompt_token_ids"] == [5, 6, 7]
            ids = choice["token_ids"]
            want = reference_logprobs(load_model(models[0]), [5, 6, 7], ids)
            np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], want, atol=1e-4)
            assert "".join(choice["logprobs"]["tokens"]) == plane.renderer.decode(ids)
            assert choice["logprobs"]["text_offset"][:3] == [0, 2, 4]
            assert first["usage"] == {
                "prompt_tokens": 3,
                "completion_tokens": len(ids),
                "total_tokens": 3 + len(ids),
            }
            # What follows a turn's tokens, and what follows nothing.
            await post(http, "completions", prompt=[[5, 6, 7, *ids, 8]])
            await post(http, "completions", prompt="abab")
            trajectory = finished(session)
            parts = list(segments(trajectory))
            assert len(parts) == 2 and trajectory.num_turns == 3
            assert trajectory.tokens[parts[0]].tolist()[: 4 + len(ids)] == [5, 6, 7, *ids, 8]
            check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())


def test_completions_with_the_openai_package(engine: Engine) -> None:
    async def body() -> None:
        async with (
            opened(engine, ["one stop two", "0123456789", "streamed"]) as (plane, session, _),
            AsyncOpenAI(base_url=plane.base_url(session), api_key=session.api_key) as client,
        ):
            stopped = await client.completions.create(model="m", prompt="go", stop="op", max_tokens=20)
            assert stopped.choices[0].text == "one stop" and stopped.choices[0].finish_reason == "stop"
            cut = await client.completions.create(model="m", prompt=["go"], max_tokens=4)
            assert cut.choices[0].text == "0123" and cut.choices[0].finish_reason == "length"
            stream = await client.completions.create(
                model="m", prompt="go", stream=True, stream_options={"include_usage": True}
            )
            events = [event async for event in stream]
            assert "".join(event.choices[0].text for event in events if event.choices) == "streamed"
            assert events[-1].usage is not None and events[-1].usage.completion_tokens == 9
            assert finished(session).num_turns == 3

    asyncio.run(body())


def test_generate_as_train_clients_use_it(engine: Engine, models: tuple[Path, Path]) -> None:
    async def body() -> None:
        async with opened(engine, ["thought", Say(text="0123456789")]) as (plane, session, http):
            url = plane.base_url(session).removesuffix("/v1") + "/inference/v1/generate"
            params = {"temperature": 0.7, "max_tokens": 8, "stop_token_ids": [3], "logprobs": 1}
            first = await post(
                http, url, model="m", token_ids=[9, 8, 7], sampling_params=params, cache_salt="x"
            )
            choice = first["choices"][0]
            ids = choice["token_ids"]
            assert first["request_id"] and choice["finish_reason"] == "stop" and len(ids) == 8
            content = choice["logprobs"]["content"]
            assert [one["token"] for one in content] == [f"token_id:{token}" for token in ids]
            want = reference_logprobs(load_model(models[0]), [9, 8, 7], ids)
            np.testing.assert_allclose([one["logprob"] for one in content], want, atol=1e-4)
            cut = await post(http, url, model="m", token_ids=[9, 8, 7, *ids, 4], sampling_params=params)
            assert cut["choices"][0]["finish_reason"] == "length"
            reward = {"reward": 0.5, "completion_id": cut["request_id"]}
            assert (await http.post("reward", json=reward)).status_code == 200
            session.end()
            assert session.finish() == [0.0, 0.5]
            trajectory = finished(session)
            assert len(list(segments(trajectory))) == 1 and trajectory.num_turns == 2
            check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())


@pytest.mark.parametrize(
    ("path", "request_body", "message"),
    [
        ("completions", {}, "prompt must be a text or a list of token ids"),
        ("completions", {"prompt": ""}, "prompt must be"),
        ("completions", {"prompt": [1.5]}, "prompt must be"),
        ("completions", {"prompt": [True]}, "prompt must be"),
        ("completions", {"prompt": [1, 1 << 31]}, "prompt must be"),
        ("completions", {"prompt": [1, 128]}, "vocabulary has 128"),
        ("completions", {"prompt": ["a", "b"]}, "2 prompts"),
        ("completions", {"prompt": [[1], [2]]}, "2 prompts"),
        ("completions", {"prompt": "a", "echo": True}, "echo is not supported"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ("completions", {"prompt": "a", "logprobs": -1}, "logprobs must be"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens must be"),
        ("completions", {"prompt": [1] * 2048}, "leaves no room"),
        ("../inference/v1/generate", {"token_ids": []}, "token_ids must be a list of token ids"),
        ("../inference/v1/generate", {"token_ids": "abc"}, "token_ids must be"),
        ("../inference/v1/generate", {"token_ids": [[1]]}, "token_ids must be"),
        ("../inference/v1/generate", {"token_ids": [1], "sampling_params": 1}, "sampling_params must be"),
        ("../inference/v1/generate", {"token_ids": [1], "features": {"a": 1}}, "features is not supported"),
        ("../inference/v1/generate", {"token_ids": [1], "stream": True}, "stream is not supported"),
        ("../inference/v1/generate", {"token_ids": [1], "sampling_params": {"stop": [""]}}, "stop must be"),
    ],
)
def test_bad_token_request_is_refused(
    path: str, request_body: dict[str, Any], message: str, engine: Engine
) -> None:
    async def body() -> None:
        async with opened(engine, []) as (_, session, http):
            response = await http.post(path, json=request_body)
            error = response.json()["error"]
            assert response.status_code == 400 and message in error["message"], response.text
            assert error["type"] == "invalid_request_error"
            assert response.headers["x-should-retry"] == "false"
            assert session.failure is None and not session.conversation.turns

    asyncio.run(body())


def test_a_route_that_is_not_there_names_those_that_are(engine: Engine) -> None:
    async def body() -> None:
        async with opened(engine, []) as (_, _, http):
            response = await http.post("embeddings", json={"model": "m", "input": "hello"})
            assert response.status_code == 404
            message = response.json()["error"]["message"]
            assert all(route in message for route in ("chat/completions", "responses", "messages"))

    asyncio.run(body())


def test_repeated_token_request_joins_its_call(engine: Engine) -> None:
    async def body() -> None:
        hold = asyncio.Event()
        async with opened(engine, [Say(text="slow", hold=hold), "again"]) as (_, session, http):
            content = json.dumps({"prompt": [5, 6]}).encode()
            lost = asyncio.create_task(http.post("completions", content=content))
            while not session.num_pending:
                await asyncio.sleep(0.01)
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            hold.set()
            joined = await http.post("completions", content=content)
            assert joined.json()["choices"][0]["text"] == "slow"
            another = await http.post("completions", content=content)
            assert another.json()["choices"][0]["text"] == "again"
            assert finished(session).num_turns == 2

    asyncio.run(body())
