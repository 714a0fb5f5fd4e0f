"""The conformance suite: checks that every engine must pass to be used by the rollout server.

Each check takes an `Engine`, embedded or SGLang. After a check the engine still generates, with the weights
that the check pushed last and under a higher version than before. `models` are two saved models of one
architecture; the engine was started with the first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiohttp
import numpy as np
import pytest

from areal_like.errors import EngineError, PromptRefusedError
from areal_like.trajectory import FinishReason
from rollout_server.policy import batcher as batcher_module
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Sampling
from tests.support import moved_clock
from tests.support.conversation_conformance import conversations_are_exact
from tests.support.engine_harness import (
    CONTEXT,
    EOS,
    TOLERANCE,
    VOCAB,
    Engine,
    Models,
    PieceTokenizer,
    Pusher,
    error_of,
    load_model,
    reference_greedy,
    reference_logprobs,
    sample,
    weights_of,
)
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

PROMPT = [5, 17, 33, 8]


async def until_running(
    client: EngineClient, num_sequences: int, *, unless: asyncio.Future[Any] | None = None
) -> None:
    """Waits until the engine decodes at least `num_sequences` sequences, or `unless` is done."""
    while (await client.load())["running"] < num_sequences and (unless is None or not unless.done()):
        await asyncio.sleep(0.01)


async def in_time(attempt: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Repeats what has to happen while requests run: on a busy machine they may have ended before it."""
    for _ in range(20):
        if await attempt():
            return
    raise AssertionError("each of 20 attempts came after the end of the requests")


async def logprobs_and_greedy_match_transformers(engine: Engine, models: Models) -> None:
    """Log-probs and greedy tokens match before and after pushes of flattened and plain buckets.

    The prompt is the same throughout, so a prefix cached under older weights would give wrong log-probs.
    """
    async with engine.client() as client:
        version = await client.weight_version()
        for path, flattened in ((models[0], None), (models[1], True), (models[0], False)):
            if flattened is not None:
                version += 1
                async with Pusher(engine, client) as pusher:
                    await pusher.push(weights_of(path), version=version, flattened=flattened)
                assert await client.weight_version() == version
            model = load_model(path)
            prompts = [PROMPT, PROMPT, [9], list(range(3, 40))]
            drawn = await asyncio.gather(
                *(
                    sample(client, p, 20, temperature=t)
                    for p, t in zip(prompts, (1.0, 0.7, 1.3, 1.0), strict=True)
                )
            )
            for prompt, generation, temperature in zip(prompts, drawn, (1.0, 0.7, 1.3, 1.0), strict=True):
                assert error_of(model, prompt, generation, temperature=temperature) < TOLERANCE
                assert generation.versions.tolist() == [version] * 20
            greedy = await sample(client, PROMPT, 12, temperature=0)
            assert greedy.output_ids.tolist() == reference_greedy(model, PROMPT, 12)
            assert error_of(model, PROMPT, greedy) < TOLERANCE


async def scores_match_transformers(engine: Engine, models: Models) -> None:
    """Scores of given tokens are those of the active weights, also while a prefix of them is cached."""
    tokens = [*PROMPT, 9, 41, 3, 22]
    async with engine.client() as client:
        version = await client.weight_version()
        for path in (models[1], models[0]):
            version += 1
            await sample(client, PROMPT, 4)
            async with Pusher(engine, client) as pusher:
                await pusher.push(weights_of(path), version=version)
            for first in (1, len(PROMPT), len(tokens) - 1):
                logprobs, scored_by = await client.score(tokens, first=first)
                want = reference_logprobs(load_model(path), tokens[:first], tokens[first:])
                assert scored_by == version
                np.testing.assert_allclose(logprobs, want, atol=TOLERANCE)


async def stop_and_length(engine: Engine, models: Models) -> None:
    """A stop token, the end-of-sequence token (unless ignored) or the length limit ends a sequence.

    The token that ends a sequence is its last token.
    """
    async with engine.client() as client:
        greedy = (await sample(client, PROMPT, 12, temperature=0)).output_ids.tolist()
        stop = greedy[6]
        assert EOS not in greedy
        stopped = await sample(client, PROMPT, 12, temperature=0, stop_token_ids=(stop,), ignore_eos=False)
        assert stopped.output_ids.tolist() == greedy[: greedy.index(stop) + 1]
        assert (stopped.finish_reason, stopped.matched) == (FinishReason.STOP, stop)
        assert (await sample(client, PROMPT, 3)).finish_reason is FinishReason.LENGTH
        drawn = await asyncio.gather(
            *(sample(client, PROMPT, 60, ignore_eos=False, temperature=1.5) for _ in range(32))
        )
        ended = [g for g in drawn if g.finish_reason is FinishReason.STOP]
        assert ended, "some of 32 long samples hit the end-of-sequence token"
        for generation in drawn:
            eos_at = np.nonzero(generation.output_ids == EOS)[0].tolist()
            assert eos_at == (
                [len(generation.output_ids) - 1] if generation.finish_reason is FinishReason.STOP else []
            )


STOPS = ("é", "aab", "ddcab")


async def stop_texts_end_a_sequence(engine: Engine, models: Models) -> None:
    """The token that completes a stop text is the last one: also at the limit of new tokens, after an abort,
    and where the text is one token that the engine knows."""
    model, tokenizer = load_model(models[0]), PieceTokenizer()
    async with engine.client() as client:
        with pytest.raises(EngineError, match="tokenizer"):
            await sample(client, PROMPT, 3, stop=("a",))
        client.stop_texts.tokenizer = tokenizer
        drawn = await asyncio.gather(
            *(sample(client, [*PROMPT, i], 60 + 4 * (i % 2), stop=STOPS) for i in range(24)),
            sample(client, PROMPT, 20),
        )
        ended = 0
        for i, generation in enumerate(drawn):
            tokens = generation.output_ids.tolist()
            end = tokenizer.first_stop(tokens, STOPS) if i < 24 else None
            assert end in (None, len(tokens)), "tokens after a stop text"
            assert (generation.finish_reason is FinishReason.STOP) == (end is not None)
            if end is not None:
                ended += 1
                assert generation.matched in STOPS
                assert generation.matched in tokenizer.text_of(tokens[-6:])
            prompt = [*PROMPT, i] if i < 24 else PROMPT
            assert error_of(model, prompt, generation) < TOLERANCE
        assert ended > 8
        tokens = (await sample(client, PROMPT, 40, temperature=0)).output_ids.tolist()
        for end in (2, 7, 12):
            text = tokenizer.text_of(tokens[end - 2 : end])
            end = tokenizer.first_stop(tokens, [text]) or end
            for num_tokens in (end, end + 1, 40):
                stopped = await sample(client, PROMPT, num_tokens, temperature=0, stop=(text,))
                assert stopped.output_ids.tolist() == tokens[:end]
                assert (stopped.finish_reason, stopped.matched) == (FinishReason.STOP, text)
            start = end - 1
            resumed = await sample(
                client, [*PROMPT, *tokens[:start]], 40, temperature=0, stop=(text,), num_resumed=start
            )
            assert resumed.output_ids.tolist() == tokens[start:end] and resumed.matched == text
        known = PieceTokenizer()
        known.token_of = lambda text: tokens[4]  # type: ignore[method-assign]
        client.stop_texts.tokenizer, client.stop_texts._tokens = known, {}
        stopped = await sample(client, PROMPT, 40, temperature=0, stop=("xyz",), ignore_eos=False)
        assert stopped.output_ids.tolist() == tokens[: tokens.index(tokens[4]) + 1]
        assert stopped.matched == tokens[4]


async def turns_reuse_what_earlier_turns_computed(engine: Engine, models: Models) -> None:
    """Conversations of four turns, with an update before the last: log-probs and versions are right, and only
    an update (or, with `keep`, an episode that began before it) changes what is in the cache.

    Every turn is requested with the cache salt of the conversation's start, as by a PolicyClient.
    """
    old, new = (load_model(path) for path in models)
    async with engine.client() as client:
        version = await client.weight_version() + 1
        async with Pusher(engine, client) as pusher:
            await pusher.push(weights_of(models[0]), version=version)
            await client.flush_cache()
            said = [list(range(3, 20 + 5 * i)) for i in range(4)]
            salt = client.cache_salt
            for turn in range(4):
                if turn == 3:
                    version += 1
                    await pusher.push(weights_of(models[1]), version=version)
                sampling = Sampling(max_new_tokens=8 + turn, ignore_eos=True, keeps_prefix=True)
                turns = await asyncio.gather(
                    *(client.generate(tokens, sampling=sampling, cache_salt=salt) for tokens in said)
                )
                for tokens, generation in zip(said, turns, strict=True):
                    assert error_of(new if turn == 3 else old, tokens, generation) < TOLERANCE
                    assert set(generation.versions.tolist()) == {version}
                    if turn in (1, 2):
                        assert generation.num_cached_tokens >= len(tokens) - 4
                    else:
                        assert generation.num_cached_tokens == 0 or turn == 0
                said = [
                    [*tokens, *generation.output_ids.tolist(), 40, 41, 42]
                    for tokens, generation in zip(said, turns, strict=True)
                ]
            await pusher.push(weights_of(models[0]), version=version + 1)


async def abort_returns_partial_tokens(engine: Engine, models: Models) -> None:
    """Requests are aborted by id and all at once; the log-probs of an aborted request's tokens are right."""
    model = load_model(models[0])
    sampling = Sampling(max_new_tokens=CONTEXT - 50, ignore_eos=True)

    async def abort_both() -> bool:
        one, two = (
            asyncio.ensure_future(client.generate(PROMPT, sampling=sampling, rid=rid)) for rid in ("1", "12")
        )
        await until_running(client, 2, unless=one)
        await client.abort("1")
        aborted = await one
        assert not two.done() or (await two).finish_reason is FinishReason.LENGTH, (
            "request 12 was aborted with request 1: compare ids for equality, not prefix"
        )
        await client.abort()
        if FinishReason.LENGTH in (aborted.finish_reason, (await two).finish_reason):
            return False
        assert aborted.finish_reason is (await two).finish_reason is FinishReason.ABORT
        assert 0 < len(aborted.output_ids) < CONTEXT - 50
        assert error_of(model, PROMPT, aborted) < TOLERANCE
        return True

    async with engine.client() as client:
        await in_time(abort_both)
        await client.abort("no such request")
        assert len((await sample(client, PROMPT, 2)).output_ids) == 2


async def a_time_out_keeps_the_partial_tokens(engine: Engine, models: Models) -> None:
    """At its time limit a sequence is truncated; others of its batch are not affected.

    Run with moved_clock. The engine stands still at the limit, so no sequence can end before it.
    """
    model = load_model(models[0])
    limit_s, aborted = 1000.0, asyncio.Event()
    async with engine.client() as client:
        batcher = client._batcher
        abort = batcher._abort_quietly

        async def observed(rids: Iterable[str]) -> None:
            await abort(rids)
            aborted.set()

        long = CONTEXT - 50
        with (
            patch.object(batcher, "_abort_quietly", observed),
            patch.object(batcher_module, "_ABORT_GRACE_S", limit_s),
        ):
            quick, *slow = [
                asyncio.ensure_future(sample(client, PROMPT, 3, timeout_s=2 * limit_s)),
                *(asyncio.ensure_future(sample(client, PROMPT, long, timeout_s=limit_s)) for _ in range(3)),
            ]
            assert (await quick).finish_reason is FinishReason.LENGTH
            await client.pause("in_place")
            advance(limit_s)
            await aborted.wait()
            await client.resume()
            for generation in await asyncio.gather(*slow):
                assert generation.finish_reason is FinishReason.TIMEOUT
                assert 0 < len(generation.output_ids) < long
                assert error_of(model, PROMPT, generation) < TOLERANCE
        assert len((await sample(client, PROMPT, 2)).output_ids) == 2


async def progress_shows_in_the_load(engine: Engine, models: Models) -> None:
    """Every step of a running request changes the client's `progress`; nothing does while it stands still."""

    async def seen(count: int) -> list[tuple[float, ...]]:
        found = []
        for _ in range(count):
            await client.load()
            found.append(client.progress)
            await asyncio.sleep(0.1)
        return found

    async def until_seen(count: int) -> None:
        """Until the progress had so many values."""
        found: set[tuple[float, ...]] = set()
        while len(found) < count:
            found.update(await seen(1))

    async with engine.client() as client:
        running = asyncio.gather(*(sample(client, PROMPT, CONTEXT - 50) for _ in range(8)))
        await until_running(client, 8)
        assert client.num_generating == 8 and not client.is_held
        await until_seen(3)
        await client.pause("in_place")
        assert client.is_held
        while len(set(await seen(4))) > 1:  # steps under way end, and are published
            pass
        assert len(set(await seen(9))) == 1, "an engine that stands still shows progress"
        await client.resume()
        assert not client.is_held
        await until_seen(3)
        await client.abort()
        await running
        assert client.num_generating == 0


async def pause_modes(engine: Engine, models: Models) -> None:
    """A pause stops running requests (mode abort ends them) and new ones; a resume continues them."""
    model = load_model(models[0])

    async def pause(mode: str) -> bool:
        running = asyncio.ensure_future(sample(client, PROMPT, 1200))
        await until_running(client, 1, unless=running)
        await client.pause(mode)
        new = asyncio.ensure_future(sample(client, PROMPT, 3))
        await asyncio.sleep(0.3)
        assert not new.done(), f"a new request was served during a pause ({mode})"
        if mode == "abort":
            await running
        was_done = running.done()
        await client.resume()
        generation = await running
        assert error_of(model, PROMPT, generation) < TOLERANCE
        assert len((await new).output_ids) == 3
        wanted = FinishReason.ABORT if mode == "abort" else FinishReason.LENGTH
        return generation.finish_reason is wanted and was_done == (mode == "abort")

    async with engine.client() as client:
        for mode in ("in_place", "retract", "abort"):
            await in_time(partial(pause, mode))


async def groups_are_made_destroyed_and_made_again(engine: Engine, models: Models) -> None:
    """Groups are made again under the same and another name; leaving one twice gets 400 and has no effect."""
    async with engine.client() as client:
        version = await client.weight_version()
        for name in ("same", "same", "other"):
            version += 1
            async with Pusher(engine, client, name=name) as pusher:
                await pusher.push(weights_of(models[0]), version=version)
        with pytest.raises(EngineError, match="400"):
            await client.destroy_weights_group(group_name="same")
        assert await client.weight_version() == version


async def versions_across_an_update_in_flight(engine: Engine, models: Models, *, running: str) -> float:
    """Requests that span an update record, for every token, the version that sampled it.

    Returns the largest log-prob error of any token under the weights of its recorded version.
    """
    old_new = [load_model(path) for path in models]
    old_weights, new_weights = (weights_of(path) for path in models)
    prompts = [PROMPT, PROMPT, [9], list(range(3, 30))]
    errors: list[float] = []

    async def update() -> bool:
        version = await client.weight_version()
        await pusher.push(old_weights, version=version + 1)
        drawing = asyncio.gather(*(sample(client, prompt, CONTEXT - 50) for prompt in prompts))
        await until_running(client, len(prompts), unless=drawing)
        await pusher.push(new_weights, version=version + 2, running=running, bucket_bytes=1 << 15)
        drawn = await drawing
        await pusher.push(old_weights, version=version + 3)
        versions = [sorted(set(generation.versions.tolist())) for generation in drawn]
        if [version + 1] in versions:
            return False
        assert versions == [[version + 1, version + 2]] * len(prompts)
        for prompt, generation in zip(prompts, drawn, strict=True):
            assert np.all(np.diff(generation.versions) >= 0)
            for model, stated in zip(old_new, (version + 1, version + 2), strict=True):
                mine = generation.versions == stated
                want = reference_logprobs(model, prompt, generation.output_ids.tolist())
                errors.append(float(np.abs(want - generation.logprobs)[mine].max()))
        return True

    async with engine.client() as client, Pusher(engine, client) as pusher:
        await in_time(update)
    return max(errors)


BAD_BODIES: list[tuple[object, str]] = [
    ({"input_ids": [5, 1.5]}, "not a token id"),
    ({"input_ids": [5, True]}, "not a token id"),
    ({"input_ids": []}, "non-empty"),
    ({"input_ids": "5"}, "must be"),
    ({"text": "hello"}, "input_ids is missing"),
    ({"input_ids": [5] * 3000}, "leave no room"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": 5000}}, "exceed the context"),
    ({"input_ids": [5], "sampling_params": {"max_tokens": 5}}, "unknown sampling parameter"),
    ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature must be"),
    ({"input_ids": [5], "sampling_params": {"temperature": "hot"}}, "temperature must be"),
    ({"input_ids": [5], "sampling_params": {"top_p": 0}}, "top_p must be"),
    ({"input_ids": [5], "sampling_params": {"top_k": 0}}, "top_k must be"),
    ({"input_ids": [5], "rid": 7}, "rid must be"),
    ({"input_ids": [5], "stream": "yes"}, "stream must be"),
    ([1, 2], "must be a JSON object"),
]
"""/generate bodies that every engine refuses, and a part of the embedded engine's error message."""

BODIES_UNSAFE_FOR_SGLANG: list[tuple[object, str]] = [
    ({"input_ids": [5, VOCAB]}, "outside the vocabulary"),
    ({"input_ids": [5, -1]}, "outside the vocabulary"),
    ({"input_ids": [[5], []]}, "non-empty"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": 0}}, "at least 1"),
    ({"input_ids": [5], "sampling_params": {"frequency_penalty": 0.5}}, "not supported"),
    ({"input_ids": [5], "sampling_params": {"stop_token_ids": [VOCAB]}}, "outside the vocabulary"),
    ({"input_ids": [5], "sampling_params": [{}, {}]}, "2 entries for 1 prompts"),
    ({"input_ids": [[5], [6]], "rid": ["a", "a"]}, "a different id"),
    ({"input_ids": [5], "rid": "\ud800"}, "half of a surrogate pair"),
]
"""Bodies that the embedded engine refuses, but that SGLang accepts, answers with 500 or crashes on.

The client of SGLang must not send them.
"""


async def bad_requests_are_refused(engine: Engine, models: Models) -> None:
    """Status 400 with a message. The engine survives, and a good request in the same batch succeeds."""
    async with aiohttp.ClientSession(headers=engine.headers) as session:
        for body, message in [*BAD_BODIES, *(BODIES_UNSAFE_FOR_SGLANG if engine.kind == "embedded" else [])]:
            async with session.post(f"{engine.url}/generate", json=body) as response:
                text = await response.text()
                assert response.status == 400, f"{body}: {response.status} {text}"
                assert engine.kind != "embedded" or message in text, f"{body}: {text}"
        async with session.post(f"{engine.url}/generate", data=b"{not json") as response:
            assert response.status == 400
    async with engine.client() as client:
        good, bad = await asyncio.gather(
            sample(client, PROMPT, 3), sample(client, [VOCAB + 5], 3), return_exceptions=True
        )
        assert not isinstance(good, BaseException) and len(good.output_ids) == 3
        assert isinstance(bad, PromptRefusedError)


STRANGERS_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/update_weights_from_disk", {"model_path": "/etc", "weight_version": "9"}),
    ("/pause_generation", {"mode": "abort"}),
    ("/init_weights_update_group", {"master_address": "192.0.2.1", "master_port": 1, "rank_offset": 1,
                                    "world_size": 2, "group_name": "g", "backend": "gloo"}),
    ("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}),
    ("/begin_weight_update", {}),
    ("/abort_request", {"abort_all": True}),
]  # fmt: skip


async def strangers_calls_are_refused(engine: Engine, models: Models) -> None:
    """Without the key, and with a wrong one, calls get status 401 and change nothing."""
    async with engine.client() as client:
        version = await client.weight_version()
        running = asyncio.create_task(sample(client, PROMPT, 200))
        await until_running(client, 1, unless=running)
        async with aiohttp.ClientSession() as session:
            for path, body in STRANGERS_CALLS:
                for key in ("", "Bearer ", "Bearer wrong", engine.api_key):
                    async with session.post(
                        f"{engine.url}{path}", json=body, headers={"Authorization": key}
                    ) as response:
                        assert response.status == 401, f"{path} with {key!r}: {await response.text()}"
            for path in ("/server_info", "/model_info", "/flush_cache"):
                async with session.get(f"{engine.url}{path}") as response:
                    assert response.status == 401, path
        generation = await running
        assert generation.finish_reason is FinishReason.LENGTH and len(generation.output_ids) == 200
        assert await client.weight_version() == version
    for name in ("cmdline", "environ"):
        assert engine.api_key.encode() not in Path(f"/proc/{engine.pid}/{name}").read_bytes()


async def update_calls_need_an_open_update_and_a_group(engine: Engine, models: Models) -> None:
    """Calls out of order get status 400 and change nothing."""
    async with engine.client() as client:
        version = await client.weight_version()
        async with Pusher(engine, client) as pusher:
            with pytest.raises(EngineError, match="400"):
                await client.end_weight_update(weight_version=version + 1, timeout_s=HANG_LIMIT_S)
            assert pusher.group is not None
        assert await client.weight_version() == version


async def throughput_of_concurrent_requests(engine: Engine) -> float:
    """Samples per second of 200 short requests that start together, so that batches can form."""
    async with engine.client() as client:
        started_s = time.perf_counter()
        await asyncio.gather(*(sample(client, [5 + i // 8], 8) for i in range(200)))
        return 200 / (time.perf_counter() - started_s)


async def recompute_in_flight_is_exact(engine: Engine, models: Models) -> None:
    """An update that recomputes KV leaves exact log-probs."""
    assert await versions_across_an_update_in_flight(engine, models, running="recompute") < TOLERANCE


async def keep_in_flight_records_versions_with_inexact_logprobs(engine: Engine, models: Models) -> None:
    """New weights over old KV give wrong log-probs; if not, KV was recomputed."""
    assert await versions_across_an_update_in_flight(engine, models, running="keep") > TOLERANCE


Check = Callable[[Engine, Models], Coroutine[Any, Any, None]]
SUITE: tuple[Check, ...] = (
    logprobs_and_greedy_match_transformers,
    scores_match_transformers,
    stop_and_length,
    stop_texts_end_a_sequence,
    turns_reuse_what_earlier_turns_computed,
    conversations_are_exact,
    a_time_out_keeps_the_partial_tokens,
    progress_shows_in_the_load,
    abort_returns_partial_tokens,
    pause_modes,
    groups_are_made_destroyed_and_made_again,
    recompute_in_flight_is_exact,
    keep_in_flight_records_versions_with_inexact_logprobs,
    strangers_calls_are_refused,
    bad_requests_are_refused,
    update_calls_need_an_open_update_and_a_group,
)


def run(check: Check, engine: Engine, models: Models) -> None:
    """Runs one check of the suite."""
    start = moved_clock.run if check is a_time_out_keeps_the_partial_tokens else asyncio.run
    start(check(engine, models))
