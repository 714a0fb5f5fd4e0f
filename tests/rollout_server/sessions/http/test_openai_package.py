"""The `openai` package against sessions: what it gets, and which turns are recorded."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pydantic
import pytest

from rollout_server.sessions.http import call_response
from rollout_server.sessions.http.call_response import CallResponse
from rollout_server.sessions.open_session import OpenSession
from tests.support.session_requests import segments_of
from tests.support.session_server import SessionServer
from tests.support.waiting import HANG_LIMIT_S

TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
HI: Any = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def client_of(server: SessionServer, session: OpenSession, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url(session), api_key=session.api_key, **options)


def test_turns_continue_one_segment(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = ["first", "second", "third"]
    messages = [*HI]
    with client_of(server, session) as client:
        for text in ("first", "second", "third"):
            answer = client.chat.completions.create(model="gpt", messages=messages)
            choice = answer.choices[0]
            assert (choice.message.content, choice.finish_reason, answer.model) == (text, "stop", "gpt")
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(server.policy.prompts[-1])
            assert answer.usage.completion_tokens == len(text) + 1
            messages += [choice.message, {"role": "user", "content": "go on"}]
    assert segments_of(server, session) == 1
    assert session.conversation.turn_lengths == [6, 7, 6]


@pytest.mark.parametrize("sends_back", ["object", "dump", "without_null", "text"])
def test_tool_calls_continue_one_segment(server: SessionServer, sends_back: str) -> None:
    session = server.add()
    server.policy.texts = [CALL, f"so{CALL}{CALL}", "done"]
    messages: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "be short"}]}, *HI]
    with client_of(server, session) as client:
        for num_calls in (1, 2):
            choice = client.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices[0]
            calls = choice.message.tool_calls
            assert calls is not None and len(calls) == num_calls and choice.finish_reason == "tool_calls"
            assert (choice.message.content is None) == (num_calls == 1)
            ids = [call.id for call in calls]
            message: Any = choice.message
            if sends_back != "object":
                message = message.model_dump(exclude_none=sends_back == "without_null")
            if sends_back == "text":
                message["content"] = message["content"] or ""
            messages += [message, *({"role": "tool", "tool_call_id": id, "content": "3"} for id in ids)]
        assert (
            client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
            .choices[0]
            .message.content
            == "done"
        )
    assert segments_of(server, session) == 1
    assert len(session.conversation.turns) == 3


@pytest.mark.parametrize("named", [False, True])
def test_calls_that_are_written_anew_continue_one_segment(server: SessionServer, named: bool) -> None:
    """As Vercel's SDK does it, with ids of its own as others have."""
    session = server.add()
    said = '<tool_call>{"name": "add", "arguments": {"b": 2.0, "a": "x"}}</tool_call>'
    server.policy.texts = [said, said, "done"]
    messages: list[Any] = [*HI]
    with client_of(server, session) as client:
        for turn in range(3):
            message = (
                client.chat.completions.create(model="m", messages=messages, tools=TOOLS).choices[0].message
            )
            if turn == 2:
                break
            assert message.tool_calls is not None and len(message.tool_calls) == 1
            function = {"arguments": '{"a":"\\u0078","b":2}', "name": "add"}
            calls = [{"function": function, "id": f"tool_{turn}", "type": "function"}]
            answer = {"role": "tool", "tool_call_id": f"tool_{turn}", "content": str(turn)}
            reply = {"role": "assistant", "content": "", "tool_calls": calls}
            messages += [reply | {"name": "Adder"} if named else reply, answer]
            if named:
                answer["name"] = "add"
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3
    ids = [one.get("tool_call_id") for one in session.conversation.turns[-1].messages]
    assert [id for id in ids if id] == ["call00000", "call00001"], "those of the calls that the policy made"


@pytest.mark.parametrize("changed", ['{"a": 2}', '{"a": "1"}', '{"a": 1, "b": 1}', '{"a": 1', "[1]"])
def test_calls_of_other_arguments_begin_a_segment(server: SessionServer, changed: str) -> None:
    session = server.add()
    server.policy.texts = [CALL, "done"]
    with client_of(server, session) as client:
        message = client.chat.completions.create(model="m", messages=HI, tools=TOOLS).choices[0].message
        reply: Any = message.model_dump(exclude_none=True)
        reply["tool_calls"][0]["function"]["arguments"] = changed
        answer = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": "3"}
        client.chat.completions.create(model="m", messages=[*HI, reply, answer], tools=TOOLS)
    assert segments_of(server, session) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "offered"),
    [
        (CALL, False),
        (f"<think>so</think>I add: {CALL}", False),
        ("<tool_call>add 1 1</tool_call>", True),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', True),
        (f'{CALL}<tool_call>{{"name": "add"', True),
    ],
)
def test_what_is_no_whole_call_is_text(server: SessionServer, said: str, offered: bool, stream: bool) -> None:
    session = server.add()
    server.policy.texts = [said, "done"]
    messages: list[Any] = [*HI]
    tools: Any = TOOLS if offered else openai.omit
    with client_of(server, session) as client:
        text, reasons = "", []
        if stream:
            for chunk in client.chat.completions.create(
                model="m", messages=messages, tools=tools, stream=True
            ):
                assert not chunk.choices[0].delta.tool_calls
                text += chunk.choices[0].delta.content or ""
                reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        else:
            choice = client.chat.completions.create(model="m", messages=messages, tools=tools).choices[0]
            assert not choice.message.tool_calls
            text, reasons = choice.message.content or "", [choice.finish_reason]
        assert (text, reasons) == (said.rpartition("</think>")[2], ["stop"])
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
        client.chat.completions.create(model="m", messages=messages, tools=tools)
    assert segments_of(server, session) == 1


def test_streams_continue_one_segment(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = ["first", f"so{CALL}{CALL}", "done"]
    messages: list[Any] = [*HI]
    with client_of(server, session) as client:
        for num_calls in (0, 2, 0):
            with client.chat.completions.stream(
                model="m", messages=messages, tools=TOOLS, stream_options={"include_usage": True}
            ) as stream:
                completion = stream.get_final_completion()
            choice = completion.choices[0]
            assert len(choice.message.tool_calls or []) == num_calls
            assert choice.finish_reason == ("tool_calls" if num_calls else "stop")
            assert completion.usage is not None and completion.usage.completion_tokens > 0
            # As a client puts it together from the deltas.
            messages.append(choice.message.model_dump(exclude_none=True))
            for call in choice.message.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "3"})
            if not num_calls:
                messages.append({"role": "user", "content": "and?"})
    assert segments_of(server, session) == 1
    assert len(session.conversation.turns) == 3


def test_a_stream_is_kept_alive(server: SessionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    session = server.add()
    server.policy.open.clear()
    send_part, parts = CallResponse._send_part, list[bytes]()

    async def watched(response: CallResponse, send: Any, part: bytes) -> None:
        await send_part(response, send, part)
        parts.append(part)
        if parts == [call_response._COMMENT] * 4:  # each is a sign of life
            server.policy.open.set()

    monkeypatch.setattr(CallResponse, "_send_part", watched)
    with client_of(server, session, max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="m", messages=HI, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ok"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_timed_out_request_is_one_turn(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = ["first", "never said"]
    server.policy.open.clear()
    threading.Timer(1.3, server.policy.open.set).start()
    with client_of(server, session, timeout=1.0, max_retries=5) as client:
        answer = client.chat.completions.create(model="m", messages=HI)
    assert answer.choices[0].message.content == "first"
    assert segments_of(server, session) == 1
    assert len(server.policy.prompts) == len(session.conversation.turns) == 1


def test_an_unread_turn_is_left_out(server: SessionServer) -> None:
    session = server.add()
    server.policy.open.clear()
    with client_of(server, session, timeout=1.0, max_retries=0) as client:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "lost"}])
        server.policy.open.set()
        server.wait(lambda: len(session.conversation.turns) == 1)
        client.with_options(timeout=HANG_LIMIT_S).chat.completions.create(model="m", messages=HI)

    def num_turns() -> tuple[int, int]:
        before = len(session.conversation.turns)
        session.finish()
        return before, len(session.conversation.turns)

    assert server.call(num_turns) == (2, 1)


def test_equal_requests_are_samples_of_their_own(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = [str(number) for number in range(8)]

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.base_url(session), api_key=session.api_key) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="m", messages=HI) for _ in range(8))
            )
        return [answer.choices[0].message.content for answer in answers]

    assert sorted(map(str, asyncio.run(ask()))) == [str(number) for number in range(8)]
    assert segments_of(server, session) == 8


def test_fields_without_effect_are_counted(server: SessionServer) -> None:
    session = server.add()
    with client_of(server, session) as client:
        answer = client.chat.completions.create(
            model="m",
            messages=HI,
            temperature=0.1,
            n=3,
            seed=5,
            tool_choice="none",
            tools=TOOLS,
            response_format={"type": "json_object"},
            max_tokens=50,
            max_completion_tokens=9,
            stop=["END"],
        )
    assert len(answer.choices) == 1
    assert set(server.book.num_ignored) == {"temperature", "n", "seed", "response_format"}
    sampling = server.policy.samplings[-1]
    assert (sampling.temperature, sampling.max_new_tokens, sampling.stop) == (1.0, 9, ("END",))
    assert "add" not in server.renderer.decode(server.policy.prompts[-1])


def test_logprobs_are_those_of_the_tokens(server: SessionServer) -> None:
    session = server.add(max_new_tokens=3)
    server.policy.texts = ["abcdef"]
    with client_of(server, session) as client:
        choice = client.chat.completions.create(
            model="m", messages=HI, logprobs=True, extra_body={"return_token_ids": True}
        ).choices[0]
    turn = session.conversation.turns[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [one.token for one in choice.logprobs.content] == ["a", "b", "c"]
    assert [one.logprob for one in choice.logprobs.content] == turn.logprobs.tolist()
    assert choice.finish_reason == "length"
    assert choice.model_extra is not None and choice.model_extra["token_ids"] == turn.sampled.tolist()


def test_models_are_listed(server: SessionServer) -> None:
    with client_of(server, server.add()) as client:
        assert [model.id for model in client.models.list()] == ["policy"]
        assert client.models.retrieve("org/name").id == "org/name"


def test_a_full_context_is_said_so(server: SessionServer) -> None:
    with client_of(server, server.add()) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as raised:
                client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x" * 5000}], stream=stream
                )
            assert raised.value.code == "context_length_exceeded"
    assert len(server.policy.prompts) == 0


def test_a_failed_engine_is_not_asked_again(server: SessionServer) -> None:
    session = server.add()
    server.policy.fails = True
    with client_of(server, session, max_retries=5) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="m", messages=HI)
        assert len(server.policy.prompts) == 1
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model="m", messages=HI)
        assert raised.value.status_code == 410


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_lease_answers_at_once(server: SessionServer, stream: bool) -> None:
    session = server.add()
    server.policy.open.clear()
    threading.Timer(0.5, server.call, [lambda: session.close("its lease was cancelled")]).start()
    with (
        client_of(server, session) as client,
        pytest.raises(openai.APIError, match="its lease was cancelled") as raised,
    ):
        list(client.chat.completions.create(model="m", messages=HI, stream=stream))
    assert raised.value.code == "session_gone"


def test_a_parsed_answer_is_what_was_sampled(server: SessionServer) -> None:
    class Sum(pydantic.BaseModel):
        total: int

    server.policy.texts = ['{"total": 4}', "four"]
    with client_of(server, server.add()) as client:
        answer = client.chat.completions.parse(model="m", messages=HI, response_format=Sum)
        assert answer.choices[0].message.parsed == Sum(total=4)
        # No decoding is constrained: the policy may say something else.
        with pytest.raises(pydantic.ValidationError):
            client.chat.completions.parse(model="m", messages=HI, response_format=Sum)
    assert server.book.num_ignored["response_format"] == 2
