"""/v1/chat/completions of a real engine process, as clients of OpenAI's API use it, and as a judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from areal_like.errors import UserError
from rollout_server.engine.http.chat import CompletionText, parse_sampled_chat
from rollout_server.rewards.library import make_rewards
from rollout_server.tasks.base import Completion, Example, Score
from tests.support.chat_models import APPENDING, chat_tokenizer
from tests.support.engine_harness import Engine, key_file, reference_greedy, running_engine
from tests.support.judge_server import run_closed

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = chat_tokenizer(APPENDING)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat_engine(path: Path) -> Iterator[Engine]:
    with running_engine(path, context_length=1024) as engine:
        yield engine


async def post(engine: Engine, body: Any, *, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers=engine.headers if headers is None else headers) as session,
        session.post(f"{engine.url}/v1/chat/completions", json=body) as response,
    ):
        if response.content_type == "text/event-stream":
            lines = (await response.text()).split("\n\n")
            return response.status, [line.removeprefix("data: ") for line in lines if line]
        return response.status, await response.json()


def answer(engine: Engine, **fields: Any) -> Any:
    body = {"model": "judge", "messages": HELLO, "max_tokens": 24, "temperature": 0, **fields}
    status, answered = asyncio.run(post(engine, body))
    assert status == 200, answered
    return answered


def test_a_greedy_answer_is_that_of_transformers(chat_engine: Engine, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    expected = reference_greedy(LlamaForCausalLM.from_pretrained(path), prompt, 24)
    answered = answer(chat_engine, ignore_eos=True)
    (choice,) = answered["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    }
    assert choice["finish_reason"] == "length" and answered["object"] == "chat.completion"
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 24, "total_tokens": len(prompt) + 24}
    assert answered["usage"] == counts
    assert answered["model"] == "judge" and answered["metadata"] == {"weight_version": "0"}


def test_seeds_choices_and_parts_of_content(chat_engine: Engine) -> None:
    def texts(**fields: Any) -> list[str]:
        answered = answer(chat_engine, temperature=1.0, **fields)
        return [choice["message"]["content"] for choice in answered["choices"]]

    two = texts(seed=3, n=2)
    assert two == texts(seed=3, n=2) and two[0] != two[1] and two != texts(seed=4, n=2)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]}]
    assert texts(seed=3, messages=parts) == texts(seed=3, messages=[{"role": "user", "content": "Hello?"}])


def test_stop_texts_end_an_answer(chat_engine: Engine) -> None:
    whole = answer(chat_engine, max_tokens=200, ignore_eos=True)["choices"][0]["message"]["content"]
    stop = whole[20:22]
    stopped = answer(chat_engine, max_tokens=200, ignore_eos=True, stop=["no such text", stop])
    (choice,) = stopped["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] < 100


def test_streams(chat_engine: Engine) -> None:
    for fields in ({}, {"stop": "e"}, {"n": 2, "temperature": 1.0, "seed": 5}):
        whole = answer(chat_engine, max_tokens=60, **fields)
        *events, last = answer(
            chat_engine, max_tokens=60, stream=True, stream_options={"include_usage": True}, **fields
        )
        chunks = list(map(json.loads, events))
        assert last == "[DONE]" and chunks[-1]["usage"] == whole["usage"]
        texts = [""] * len(whole["choices"])
        reasons = [None] * len(texts)
        for chunk in chunks[:-1]:
            assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"]
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]
        assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"content": "hello"}]}, r"messages[0] must be an object with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be a text"),
        ({"max_tokens": 0}, "max_tokens must be an integer"),
        ({"max_tokens": 1024}, "exceed the context of 1024"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, "leave no room in a context of 1024"),
        ({"temperature": -1}, "temperature must be a number"),
        ({"top_p": 2}, "top_p must be"),
        ({"n": 1000}, "n must be an integer between 1 and 128"),
        ({"stop": [""]}, "none of them empty"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"chat_template_kwargs": {"messages": []}}, "are not settings"),
        ({"chat_template_kwargs": {"chat_template": "{{ 'x' * 99 }}"}}, "are not settings"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"model": "\udfff"}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a" * (1 << 18)}]}, "bytes; at most 131072 are read"),
    ],
)
def test_bad_requests_have_openais_errors(chat_engine: Engine, fields: dict[str, Any], problem: str) -> None:
    status, answered = asyncio.run(post(chat_engine, {"messages": HELLO, **fields}))
    assert status == 400 and answered["error"]["type"] == "invalid_request_error"
    assert problem in answered["error"]["message"]


def test_access_and_models(chat_engine: Engine, path: Path) -> None:
    async def body() -> None:
        status, _ = await post(chat_engine, {"messages": HELLO}, headers={})
        assert status == 401
        async with (
            aiohttp.ClientSession(headers=chat_engine.headers) as session,
            session.get(f"{chat_engine.url}/v1/models") as response,
        ):
            (model,) = (await response.json())["data"]
        assert model["id"] == str(path) and model["max_model_len"] == 1024

    asyncio.run(body())


def test_a_model_without_a_template_is_refused(tmp_path: Path, path: Path) -> None:
    """And /generate needs no tokenizer."""
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(path).save_pretrained(bare)
    with running_engine(bare) as engine:

        async def body() -> None:
            async with (
                aiohttp.ClientSession(headers=engine.headers) as session,
                session.post(f"{engine.url}/generate", json={"input_ids": [3, 4]}) as response,
            ):
                assert response.status == 200
            status, answered = await post(engine, {"messages": HELLO})
            assert status == 400 and "has no tokenizer" in answered["error"]["message"]
            (bare / "tokenizer.json").write_text('{"added_tokens": []}')
            status, answered = await post(engine, {"messages": HELLO})
            assert status == 400 and "has no tokenizer that" in answered["error"]["message"]

        asyncio.run(body())


def test_the_engine_as_a_judge(chat_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model gives no verdict: it is asked again, and the failure says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge = {
        "name": "judge",
        "url": f"{chat_engine.url}/v1",
        "api_key_file": str(key_file(tmp_path)),
        "rubric": "Is it right?",
        "max_tokens": 8,
        "max_retries": 2,
    }
    rewards = make_rewards(judge)

    async def body() -> Any:
        scoring = rewards.score(Example(prompt="2+2=", answer="4"), Completion("4"))
        assert not isinstance(scoring, Score)
        return await asyncio.gather(scoring, return_exceptions=True)

    (error,) = run_closed(rewards, body)
    assert "its reply has no score at the end" in str(error) and "after 3 tries" in str(error)


@given(
    st.lists(st.text(alphabet="abé", min_size=1), max_size=6), st.lists(st.sampled_from(["ab", "é", "bb"]))
)
@example(["abab"], ["abab"])
def test_text_is_sent_once_and_never_behind_a_stop(pieces: list[str], stops: list[str]) -> None:
    """Tokens are bytes, so a character may come in parts."""
    tokens = list("".join(pieces).encode())
    text = CompletionText(lambda ids: bytes(ids).decode(errors="replace"), stops)
    sent = "".join(
        text.read(tokens[:end], is_complete=end == len(tokens)) for end in range(1, len(tokens) + 1)
    )
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert sent == text.text == whole[: min(ends, default=len(whole))]
    assert text.has_stopped == bool(ends)


@pytest.mark.parametrize("num_at_once", [1, 4])
def test_the_stop_text_that_is_complete_first_counts(num_at_once: int) -> None:
    text = CompletionText("".join, ["abbé", "b"])
    for end in range(num_at_once, 5, num_at_once):
        text.read("abbé"[:end], is_complete=end == 4)
    assert text.text == "a"


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "messages",
                "n",
                "stop",
                "seed",
                "stream",
                "model",
                "max_tokens",
                "stream_options",
                "logprobs",
                "tools",
                "temperature",
            ]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_body_is_parsed_or_refused(body: dict[str, Any]) -> None:
    try:
        parse_sampled_chat(body)
    except UserError as error:
        assert str(error)
