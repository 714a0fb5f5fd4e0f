"""The embedded engine over HTTP: the conformance suite, response formats, streams, limits, metrics."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgpack
import numpy as np
import pytest

from areal_like.errors import EngineError, PromptRefusedError
from areal_like.http.streams import EVENTS, FRAMES, pack_tokens, read_events, read_frames
from rollout_server.policy import batcher
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import (
    Generation,
    Sampling,
    is_last,
    output_tokens,
    parse_generation,
)
from tests.support import engine_conformance as conformance
from tests.support.engine_harness import Engine, Models, running_engine, sample, save_models
from tests.support.quick import others_in_chaos
from tests.support.waiting import HANG_LIMIT_S

PROMPT = conformance.PROMPT
QUICK = set(conformance.SUITE) - {conformance.keep_in_flight_records_versions_with_inexact_logprobs}
"""The other one is played by a whole server too: tests/rollout_server/test_server.py."""


@pytest.mark.parametrize(
    "check", others_in_chaos(conformance.SUITE, quick=QUICK), ids=lambda check: check.__name__
)
def test_conformance(engine: Engine, models: Models, check: conformance.Check) -> None:
    conformance.run(check, engine, models)


@pytest.fixture(scope="module")
def gpt2_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"), "gpt2")


@pytest.fixture(scope="module")
def gpt2_engine(gpt2_models: Models) -> Iterator[Engine]:
    """The generic path, with streaming, a body limit and no prefix cache."""
    with running_engine(
        gpt2_models[0], stream_interval=4, max_body_bytes=4000, prefix_cache_tokens=0
    ) as engine:
        yield engine


def test_generic_path_matches_transformers(gpt2_engine: Engine, gpt2_models: Models) -> None:
    asyncio.run(conformance.logprobs_and_greedy_match_transformers(gpt2_engine, gpt2_models))
    asyncio.run(conformance.scores_match_transformers(gpt2_engine, gpt2_models))


def test_requests_of_pages_and_other_hosts_are_refused(engine: Engine) -> None:
    async def body() -> None:
        async with aiohttp.ClientSession(headers=engine.headers) as session:
            for headers, status in (({"Origin": "null"}, 403), ({"Host": "evil.example"}, 421), ({}, 200)):
                async with session.get(f"{engine.url}/flush_cache", headers=headers) as response:
                    assert response.status == status

    asyncio.run(body())


def test_closing_a_client_fails_unsent_requests(engine: Engine) -> None:
    async def body() -> None:
        client = engine.client()
        waiting = asyncio.create_task(sample(client, PROMPT, 5))
        while not client._batcher._tasks:  # until the task exists; it has not run yet
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(EngineError, match="client was closed"):
            await asyncio.wait_for(waiting, HANG_LIMIT_S)

    asyncio.run(body())


def test_seeded_sample_does_not_depend_on_the_batch(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            alone = await sample(client, PROMPT, 20, sampling_seed=11)
            crowd = await asyncio.gather(
                *(sample(client, [7 + i], 30) for i in range(20)),
                sample(client, PROMPT, 20, sampling_seed=11),
            )
            assert crowd[-1].output_ids.tolist() == alone.output_ids.tolist()
            other = await sample(client, PROMPT, 20, sampling_seed=12)
            unseeded = [await sample(client, PROMPT, 20) for _ in range(2)]
            assert len({tuple(g.output_ids.tolist()) for g in (alone, other, *unseeded)}) == 4

    asyncio.run(body())


def test_numbers_too_large_or_small_for_arrays(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            free = await sample(client, PROMPT, 5, sampling_seed=3)
            unlimited = await sample(client, PROMPT, 5, sampling_seed=3, top_k=1 << 63)
            assert unlimited.output_ids.tolist() == free.output_ids.tolist()
            greedy = await sample(client, PROMPT, 5, temperature=0.0)
            nearly = await sample(client, PROMPT, 5, temperature=1e-40)
            assert nearly.output_ids.tolist() == greedy.output_ids.tolist()
            assert np.array_equal(nearly.logprobs, greedy.logprobs)

    asyncio.run(body())


async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def test_single_and_batched_responses_are_sglangs(engine: Engine) -> None:
    async def body() -> None:
        async with aiohttp.ClientSession(headers=engine.headers) as session:
            url = f"{engine.url}/generate"
            params = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}
            one = await post(
                session,
                url,
                {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "rid": "r"},
            )
            meta = one["meta_info"]
            assert len(one["output_ids"]) == 3 and meta["id"] == "r" and meta["prompt_tokens"] == 4
            assert meta["finish_reason"] == {"type": "length", "length": 3}
            assert [entry[1:] for entry in meta["output_token_logprobs"]] == [
                [token, None] for token in one["output_ids"]
            ]
            assert [(s["start"], s["end"]) for s in meta["weight_versions"]] == [(0, 3)]
            many = await post(
                session,
                url,
                {
                    "input_ids": [PROMPT, [9]],
                    "sampling_params": [{**params, "n": 2}, params],
                    "return_logprob": None,
                },
            )
            assert [a["output_ids"] for a in many[:2]] == [one["output_ids"]] * 2 and len(many) == 3
            assert "output_token_logprobs" not in many[0]["meta_info"]

    asyncio.run(body())


def test_stream_interval_sends_cumulative_chunks(gpt2_engine: Engine) -> None:
    async def body(engine: Engine) -> None:
        body = {
            "input_ids": PROMPT,
            "sampling_params": {"max_new_tokens": 10, "ignore_eos": True},
            "stream": True,
            "return_logprob": True,
        }
        events = []
        async with (
            aiohttp.ClientSession(headers=engine.headers) as session,
            session.post(f"{engine.url}/generate", json=body) as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
        lengths = [len(event["output_ids"]) for event in events]
        assert lengths == [4, 8, 10]
        final = events[-1]["output_ids"]
        assert all(event["output_ids"] == final[: len(event["output_ids"])] for event in events)
        assert [event["meta_info"]["finish_reason"] is None for event in events] == [True, True, False]
        async with engine.client() as client:
            assert len((await sample(client, PROMPT, 11)).output_ids) == 11

    asyncio.run(body(gpt2_engine))


def test_packed_and_json_streams_say_the_same(gpt2_engine: Engine) -> None:
    params = {"max_new_tokens": 10, "ignore_eos": True, "sampling_seed": 3}
    body = {"rid": ["a", "b"], "sampling_params": [params] * 2, "stream": True, "return_logprob": True}

    async def generations(content: bytes, headers: dict[str, str]) -> list[Generation]:
        async with (
            aiohttp.ClientSession(headers=gpt2_engine.headers) as session,
            session.post(f"{gpt2_engine.url}/generate", data=content, headers=headers) as response,
        ):
            assert response.content_type == headers["Accept"], await response.text()
            read = read_frames if response.content_type == FRAMES else read_events
            events = [event async for event in read(response.content.iter_any())]
        assert sorted(len(output_tokens(event)) for event in events) == [4, 4, 8, 8, 10, 10]
        last = sorted(filter(is_last, events), key=lambda event: int(event["index"]))
        return [parse_generation(event) for event in last]

    as_json = json.dumps(body | {"input_ids": [PROMPT, [9]]}).encode()
    packed = msgpack.packb(body | {"input_ids": [pack_tokens(PROMPT), [9]]})
    both = [
        asyncio.run(generations(content, {"Content-Type": kind, "Accept": accept}))
        for content, kind, accept in (
            (as_json, "application/json", EVENTS),
            (packed, FRAMES, FRAMES),
        )
    ]
    for of_json, of_frames in zip(*both, strict=True):
        assert np.array_equal(of_json.output_ids, of_frames.output_ids)
        assert np.array_equal(of_json.logprobs, of_frames.logprobs) and np.all(of_frames.logprobs < 0)
        assert np.array_equal(of_json.versions, of_frames.versions) and of_frames.num_prompt_tokens


def test_a_client_packs_after_a_packed_answer(gpt2_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bool] = []
    encode = batcher.encode_request

    def watched(*args: Any, is_packed: bool, **options: Any) -> Any:
        sent.append(is_packed)
        return encode(*args, is_packed=is_packed, **options)

    monkeypatch.setattr(batcher, "encode_request", watched)

    async def body() -> None:
        async with gpt2_engine.client() as client:
            for _ in range(2):
                assert len((await sample(client, PROMPT, 3)).output_ids) == 3
            with pytest.raises(PromptRefusedError, match="1099511627776 is outside the vocabulary"):
                await sample(client, [1 << 40], 3)

    asyncio.run(body())
    assert sent == [False, True, True]


async def until_empty(client: EngineClient) -> None:
    while (load := (await client.server_info())["load"])["running"] + load["waiting"]:
        await asyncio.sleep(0.02)


def test_disconnect_aborts_the_clients_sequences(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as watcher:
            client = engine.client()
            tasks = [asyncio.ensure_future(sample(client, PROMPT, 2000)) for _ in range(4)]
            await conformance.until_running(watcher, 4)
            await watcher.pause("in_place")  # so that none ends by itself meanwhile
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            while (await watcher.server_info())["load"]["running"] != 3:
                await asyncio.sleep(0.01)
            await client.close()
            for task in tasks[1:]:
                with pytest.raises(EngineError):
                    await task
            await until_empty(watcher)
            await watcher.resume()
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}
            async with aiohttp.ClientSession(
                headers=engine.headers, timeout=aiohttp.ClientTimeout(total=0.1)
            ) as session:
                with pytest.raises(TimeoutError):
                    await session.post(f"{engine.url}/generate", json=body)
            await until_empty(watcher)

    asyncio.run(body())


async def first_tokens(engine: Engine) -> tuple[int, str]:
    """Sequences that the histogram has counted, and the page that says so."""
    async with (
        aiohttp.ClientSession(headers=engine.headers) as session,
        session.get(f"{engine.url}/metrics") as response,
    ):
        text = await response.text()
    found = re.search(r"^areal_engine_first_token_seconds_count (\S+)$", text, re.M)
    assert found is not None
    return int(float(found[1])), text


def test_server_info_metrics_and_idle_time(engine: Engine) -> None:
    async def body() -> None:
        async with engine.client() as client:
            assert await client.health()
            await client.flush_cache()
            num_before, _ = await first_tokens(engine)
            before = (await client.server_info())["load"]
            await asyncio.sleep(0.3)
            idle = (await client.server_info())["load"]
            assert idle["idle_s"] - before["idle_s"] >= 0.29 and idle["busy_s"] == before["busy_s"]
            await asyncio.gather(*(sample(client, [5, 6, 7], 10) for _ in range(8)))
            after = (await client.server_info())["load"]
            assert after["generated_tokens"] - idle["generated_tokens"] == 80
            assert after["prefilled_tokens"] - idle["prefilled_tokens"] == 2, (
                "a group's prompt is computed once"
            )
            assert after["busy_s"] > idle["busy_s"]
            num_first, text = await first_tokens(engine)
            assert num_first == num_before + 8, "one first token a sequence"
            assert f"areal_engine_generated_tokens_total {after['generated_tokens']}.0" in text
            assert "areal_engine_kv_rows_used 0.0" in text

    asyncio.run(body())


def test_body_above_the_limit_is_413(gpt2_engine: Engine) -> None:
    async def body(engine: Engine) -> None:
        body = {"input_ids": [5] * 2000}
        async with (
            aiohttp.ClientSession(headers=engine.headers) as session,
            session.post(f"{engine.url}/generate", json=body) as response,
        ):
            assert response.status == 413
        async with engine.client() as client:
            await client.generate(PROMPT, sampling=Sampling(max_new_tokens=2))

    asyncio.run(body(gpt2_engine))
