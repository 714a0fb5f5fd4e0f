"""OpenAI's Responses API in sessions, by the `openai` package and by plain requests."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from rollout_server.sessions.open_session import OpenSession
from tests.support.session_requests import Events, posted, segments_of
from tests.support.session_server import SessionServer

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS: Any = [{"type": "function", "name": "add", "description": "Adds.", "parameters": PARAMETERS}]
CHAT_TOOLS: Any = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
THOUGHT = "<think>so</think>"
HI: Any = [{"role": "user", "content": "hi"}]
PART = ["response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done"]  # fmt: skip
ARGUMENTS = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]


def client_of(server: SessionServer, session: OpenSession, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url(session), api_key=session.api_key, **options)


def references(response: Any) -> list[Any]:
    return [{"type": "item_reference", "id": item.id} for item in response.output]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sends", ["items", "dumps", "no reasoning", "references", "previous"])
def test_tool_turns_are_one_segment(server: SessionServer, sends: str, stream: bool) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}one{CALL}", f"{THOUGHT}{CALL}{CALL}", "done"]
    options: dict[str, Any] = {"model": "gpt", "instructions": "be short", "tools": TOOLS}
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    previous: Any = openai.omit
    with client_of(server, session) as client:
        for num_calls in (1, 2, 0):
            if stream:
                with client.responses.stream(input=items, previous_response_id=previous, **options) as events:
                    events.until_done()
                    response: Any = events.get_final_response()
            else:
                response = client.responses.create(input=items, previous_response_id=previous, **options)
            assert (response.status, response.instructions) == ("completed", "be short")
            calls = [item for item in response.output if item.type == "function_call"]
            assert len(calls) == num_calls
            outputs = [
                {"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls
            ]
            match sends:
                case "items":
                    items = [*items, *response.output, *outputs]
                case "dumps":
                    dumped = [item.model_dump(exclude_unset=True) for item in response.output]
                    items = [*items, *dumped, *outputs]
                case "no reasoning":
                    others = [item for item in response.output if item.type != "reasoning"]
                    items = [*items, *others, *outputs]
                case "references":
                    items = [*items, *references(response), *outputs]
                case _:
                    items, previous = outputs, response.id
    assert response.output_text == "done"
    assert response.usage.input_tokens == len(server.policy.prompts[-1])
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3
    assert server.renderer.decode(server.policy.prompts[0]).count("be short") == 1


def test_events_have_the_documented_order(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}I add:{CALL}"]
    body = {"input": "hi", "tools": TOOLS, "stream": True}
    status, events = posted(server, session, "v1/responses", body)
    assert status == 200
    reasoning = [name.replace("output_text", "reasoning_text") for name in PART]
    added, done = "response.output_item.added", "response.output_item.done"
    assert [name for name, _ in events] == [
        "response.created", "response.in_progress", added, *reasoning, done, added, *PART, done,
        added, *ARGUMENTS, done, "response.completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    check_places(events)
    response = events[-1][1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert response["output"] == [event["item"] for name, event in events if name == done]
    assert {event["response"]["id"] for _, event in events if "response" in event} == {response["id"]}
    assert events[0][1]["response"]["status"] == "in_progress" and response["status"] == "completed"


def check_places(events: Events) -> None:
    """Deltas add up to the items that are said to be done, under the same ids and indices."""
    texts: dict[tuple[int, str], str] = {}
    for _, event in events:
        if "delta" in event:
            key = event["output_index"], event["item_id"]
            texts[key] = texts.get(key, "") + event["delta"]
    for name, event in events:
        if name == "response.output_item.done":
            item = event["item"]
            text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
            assert texts[event["output_index"], item["id"]] == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_makes_a_response_incomplete(server: SessionServer, stream: bool) -> None:
    session = server.add()
    server.policy.texts = ["abcdef"]
    body = {"input": "hi", "max_output_tokens": 3, "stream": stream}
    _, answer = posted(server, session, "v1/responses", body)
    if stream:
        assert answer[-1][0] == "response.incomplete"
        answer = answer[-1][1]["response"]
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (message,) = answer["output"]
    assert (message["content"][0]["text"], message["status"]) == ("abc", "incomplete")
    assert answer["usage"]["output_tokens"] == 3


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_reply_is_a_message(server: SessionServer, text: str) -> None:
    session = server.add()
    server.policy.texts = [text, "ok"]
    with client_of(server, session) as client:
        first = client.responses.create(model="m", input=HI)
        assert [item.type for item in first.output] == ["message"] and first.output_text == text
        client.responses.create(model="m", input=[*HI, *first.output, *HI])
    assert segments_of(server, session) == 1


def test_instructions_are_not_stored(server: SessionServer) -> None:
    session = server.add()
    with client_of(server, session) as client:
        first = client.responses.create(model="m", input=HI, instructions="be rude")
        client.responses.create(
            model="m", input="so", instructions="be polite", previous_response_id=first.id
        )
        client.responses.create(model="m", input="so", instructions="be rude", previous_response_id=first.id)
    last = [server.renderer.decode(prompt) for prompt in server.policy.prompts]
    assert "rude" not in last[1] and "<|user|>hi<|end|>\n<|assistant|>ok<|end|>\n<|user|>so" in last[1]
    assert segments_of(server, session) == 2, "other instructions are another beginning"


@pytest.mark.parametrize("of", ["another session", "nothing", "not stored", "chat", "item"])
def test_unknown_responses_are_refused(server: SessionServer, of: str) -> None:
    session, other = server.add(), server.add()
    with client_of(server, other if of == "another session" else session) as client:
        first = client.responses.create(model="m", input=HI, store=of != "not stored")
        chat = client.chat.completions.create(model="m", messages=HI)
    id = {"nothing": "resp_" + 32 * "0", "chat": chat.id, "item": "x"}.get(of, first.id)
    items = [{"type": "item_reference", "id": id}] if of == "item" else "go on"
    body = {"input": items, "previous_response_id": None if of == "item" else id}
    num_prompts = len(server.policy.prompts)
    status, answer = posted(server, session, "v1/responses", body)
    assert status == 400 and answer["error"]["code"] == "previous_response_not_found"
    assert answer["error"]["param"] == ("input[0]" if of == "item" else "previous_response_id")
    assert len(server.policy.prompts) == num_prompts


def test_a_reply_is_in_a_prompt_once(server: SessionServer) -> None:
    """Otherwise a small body could refer to a long reply thousands of times."""
    session = server.add()
    server.policy.texts = [f"{CALL}{CALL}", "x" * 200, "done", "done"]
    options: dict[str, Any] = {"model": "m", "tools": TOOLS}
    with client_of(server, session) as client:
        calls = client.responses.create(input=HI, **options)
        items: list[Any] = [*HI]
        for one in calls.output:
            output = {"type": "function_call_output", "call_id": one.call_id, "output": "3"}
            items += [{"type": "item_reference", "id": one.id}, output]
        long = client.responses.create(input=items, **options)
        assert segments_of(server, session) == 1
        items += [*references(long), {"type": "item_reference", "id": calls.output[0].id}] * 100
        client.responses.create(input=[*items, *HI], **options)
    assert segments_of(server, session) == 1
    assert server.renderer.decode(server.policy.prompts[-1]).count("x" * 200) == 1


def test_the_oldest_responses_are_forgotten(server: SessionServer) -> None:
    session = server.add()
    with client_of(server, session) as client:
        first = client.responses.create(model="m", input="x" * 200)
        assert 200 < session.kept.num_bytes == server.book.num_kept_bytes < 600
        session.kept.max_bytes = 700
        second = client.responses.create(model="m", input="y" * 200)
        assert 200 < session.kept.num_bytes < 600
        client.responses.create(model="m", input="go on", previous_response_id=second.id)
        with pytest.raises(openai.BadRequestError, match="700 bytes"):
            client.responses.create(model="m", input="go on", previous_response_id=first.id)
    server.call(lambda: server.book.remove(session))
    assert server.book.num_kept_bytes == 0


@pytest.mark.parametrize("instructions", [("be short", "be short"), ("be short", "be long")])
def test_a_reply_of_the_previous_response_is_there_once(
    server: SessionServer, instructions: tuple[str, str]
) -> None:
    """Some SDKs send the previous response and references to its items."""

    def prompts(*, refers: bool) -> list[str]:
        session = server.add()
        server.policy.texts = [f"{THOUGHT}one{CALL}", f"two{CALL}", "done"]
        seen: list[Any] = []
        items, first = [*HI], len(server.policy.prompts)
        with client_of(server, session) as client:
            for told in (*instructions, instructions[-1]):
                previous = seen[-1].id if seen else openai.omit
                response = client.responses.create(
                    model="m", input=items, instructions=told, tools=TOOLS, previous_response_id=previous
                )
                seen.append(response)
                items = [one for each in seen for one in references(each)] if refers else []
                items += [
                    {"type": "function_call_output", "call_id": item.call_id, "output": "3"}
                    for item in response.output
                    if item.type == "function_call"
                ]
        return [server.renderer.decode(prompt) for prompt in server.policy.prompts[first:]]

    assert prompts(refers=True) == prompts(refers=False)


def test_a_reference_brings_only_its_own_reply(server: SessionServer) -> None:
    """What the referred response itself followed is not in the conversation, and may be referred to."""
    session = server.add()
    server.policy.texts = ["one", "two", "three", "four"]
    options: dict[str, Any] = {"model": "m"}
    with client_of(server, session) as client:
        first = client.responses.create(input=HI, **options)
        second = client.responses.create(input=HI, previous_response_id=first.id, **options)
        third = client.responses.create(input=[*references(second), *HI], **options)
        client.responses.create(input=[*references(first), *HI], previous_response_id=third.id, **options)
    prompt = server.renderer.decode(server.policy.prompts[-1])
    assert [prompt.count(text) for text in ("one", "two", "three")] == [1, 1, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_kept_response_is_read_again(server: SessionServer, stream: bool) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}I add:{CALL}", "abcdef"]
    options: dict[str, Any] = {
        "model": "gpt", "input": HI, "instructions": "be short", "tools": TOOLS, "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    sent: list[Any] = []
    with client_of(server, session) as client:
        for more in ({}, {"max_output_tokens": 3, "tools": []}):
            response = client.responses.create(**options | more, stream=stream)
            if stream:
                *_, last = response
                response = last.response
            sent.append(response)
        heard = session.num_heard
        again = [client.responses.retrieve(one.id) for one in sent]
        assert session.num_heard == heard + 2, "a sign of life"
    assert [one.model_dump() for one in again] == [one.model_dump() for one in sent]
    assert (again[1].status, again[1].output_text, again[1].tools) == ("incomplete", "abc", [])
    assert len(server.policy.prompts) == 2


def test_input_items_are_listed(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}I add:{CALL}", "done"]
    with client_of(server, session) as client:
        first = client.responses.create(model="m", input=HI, instructions="be short", tools=TOOLS)
        call = first.output[-1]
        assert call.type == "function_call"
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        items: Any = [output, {"role": "developer", "content": "go"}]
        second = client.responses.create(
            model="m", input=items, instructions="be long", tools=TOOLS, previous_response_id=first.id
        )
        listed = list(client.responses.input_items.list(second.id, limit=2, order="asc"))
        newest = client.responses.input_items.list(second.id)
        assert [item.id for item in newest.data] == [item.id for item in reversed(listed)]
        assert not newest.has_more
        only = client.responses.input_items.list(first.id).data
    shown = [item.model_dump(exclude_none=True) for item in listed]
    assert [(item["type"], item.get("role")) for item in shown] == [
        ("message", "user"), ("reasoning", None), ("message", "assistant"), ("function_call", None),
        ("function_call_output", None), ("message", "system"),
    ]  # fmt: skip
    assert [item["content"][0]["text"] for item in shown if "content" in item] == ["hi", "so", "I add:", "go"]
    assert (shown[3]["call_id"], shown[3]["arguments"]) == (call.call_id, call.arguments)
    assert (shown[4]["call_id"], shown[4]["output"]) == (call.call_id, "3")
    assert len({item["id"] for item in shown}) == len(shown) == 6
    assert [item.type for item in only] == ["message"], "the instructions are no item"
    for item in (shown[0], shown[1]):
        reference = {"type": "item_reference", "id": item["id"]}
        status, answer = posted(server, session, "v1/responses", {"input": [reference]})
        assert (status, answer["error"]["param"]) == (400, "input[0]")


def test_a_list_has_pages(server: SessionServer) -> None:
    session = server.add()
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    response = posted(server, session, "v1/responses", {"input": items})[1]
    path = f"v1/responses/{response['id']}/input_items"
    seen, after, more = [], "", True
    while more:
        query = "?limit=2&order=asc" + (f"&after={after}" if after else "")
        _, page = posted(server, session, path + query, {}, method="GET")
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += [item["content"][0]["text"] for item in page["data"]]
        after, more = page["last_id"], page["has_more"]
    assert seen == ["0", "1", "2", "3", "4"]
    _, page = posted(server, session, f"{path}?order=asc&after={after}", {}, method="GET")
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_a_deleted_response_is_gone(server: SessionServer) -> None:
    session = server.add()
    body, key = {"input": "hi", "tools": TOOLS}, {"Idempotency-Key": "a"}
    id = posted(server, session, "v1/responses", body, key)[1]["id"]
    with client_of(server, session) as client:
        client.responses.delete(id)
        assert session.kept.num_bytes == 0
        assert posted(server, session, "v1/responses", body, key)[1]["id"] == id, "the same turn"
        responses = client.responses
        for request in (responses.retrieve, responses.delete, responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="deleted"):
                request(id)
        with pytest.raises(openai.BadRequestError, match="deleted"):
            client.responses.create(model="m", input="go on", previous_response_id=id)
    assert session.kept.num_bytes == 0 and len(session.conversation.turns) == 1
    status, answer = posted(server, session, "v1/responses", {"input": "more"})
    status, answer = posted(server, session, f"v1/responses/{answer['id']}", {}, method="DELETE")
    assert (status, answer["deleted"], answer["object"]) == (200, True, "response")


@pytest.mark.parametrize("of", ["another session", "nothing", "not stored", "chat", "item"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_response_is_not_found(server: SessionServer, of: str, method: str) -> None:
    session, other = server.add(), server.add()
    with client_of(server, other if of == "another session" else session) as client:
        first = client.responses.create(model="m", input=HI, store=of != "not stored")
        chat = client.chat.completions.create(model="m", messages=HI)
    id = {"nothing": "x", "chat": chat.id, "item": first.output[0].id}.get(of, first.id)
    paths = [f"v1/responses/{id}"] + ([f"v1/responses/{id}/input_items"] if method == "GET" else [])
    for path in paths:
        status, answer = posted(server, session, path, {}, method=method)
        assert (status, answer["error"]["code"]) == (404, "response_not_found")
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    if of == "another session":
        assert posted(server, other, paths[0], {}, method=method)[0] == 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?stream=true", "stream"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?limit=" + "9" * 5000, "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
    ],
)
def test_wrong_queries_are_refused(server: SessionServer, query: str, param: str) -> None:
    session = server.add()
    response = posted(server, session, "v1/responses", {"input": "hi"})[1]
    status, answer = posted(server, session, f"v1/responses/{response['id']}{query}", {}, method="GET")
    assert (status, answer["error"]["param"]) == (400, param)


def test_apis_share_one_conversation(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = [CALL, "two", "three"]
    with client_of(server, session) as client:
        chat = client.chat.completions.create(model="m", messages=HI, tools=CHAT_TOOLS).choices[0].message
        assert chat.tool_calls
        call = chat.tool_calls[0]
        assert call.type == "function"
        items: list[Any] = [
            *HI,
            {"type": "function_call", "call_id": call.id, "name": "add", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": call.id, "output": "2"},
        ]
        response = client.responses.create(model="m", input=items, tools=TOOLS)
        assert response.output_text == "two"
    use = {"type": "tool_use", "id": call.id, "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
    body = {
        "max_tokens": 9,
        "tools": [{"name": "add", "description": "Adds.", "input_schema": PARAMETERS}],
        "messages": [
            *HI,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "and?"},
        ],
    }
    status, message = posted(server, session, "v1/messages", body)
    assert (status, message["content"]) == (200, [{"type": "text", "text": "three"}])
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3


def test_a_repeated_request_is_one_turn(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = ["first", "second"]
    body = {"input": "hi"}
    key = {"Idempotency-Key": "a"}
    first = posted(server, session, "v1/responses", body, key)[1]
    again = posted(server, session, "v1/responses", body, key)[1]
    retried = posted(server, session, "v1/responses", {**body}, {**key, "x-stainless-retry-count": "1"})[1]
    assert first["id"] == again["id"] == retried["id"] and first["output"] == again["output"]
    assert posted(server, session, "v1/responses", body)[1]["id"] != first["id"]
    assert len(session.conversation.turns) == 2


def test_a_turn_has_a_reward_by_its_response(server: SessionServer) -> None:
    session = server.add()
    response = posted(server, session, "v1/responses", {"input": "hi"})[1]
    for id in (response["id"], response["output"][0]["id"]):
        assert posted(server, session, "reward", {"reward": 0.5, "completion_id": id})[0] == 200
    assert server.call(session.finish) == [0.5]


def test_logprobs_are_included(server: SessionServer) -> None:
    session = server.add()
    with client_of(server, session) as client:
        response = client.responses.create(model="m", input=HI, include=["message.output_text.logprobs"])
    (message,) = response.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None
    assert [one.logprob for one in logprobs] == session.conversation.turns[0].logprobs.tolist()
    assert not server.book.num_ignored


def test_fields_without_effect_are_counted(server: SessionServer) -> None:
    session = server.add()
    with client_of(server, session) as client:
        response = client.responses.create(
            model="m",
            input=HI,
            tools=TOOLS,
            tool_choice="none",
            temperature=0.1,
            truncation="auto",
            reasoning={"effort": "low"},
            text={"format": {"type": "json_object"}},
            metadata={"a": "b"},
            max_output_tokens=9,
            store=True,
        )
    assert (response.metadata, response.truncation, response.temperature) == ({"a": "b"}, "disabled", None)
    assert set(server.book.num_ignored) == {"temperature", "truncation", "reasoning", "text"}
    sampling = server.policy.samplings[-1]
    assert (sampling.temperature, sampling.max_new_tokens) == (1.0, 9)
    assert "add" not in server.renderer.decode(server.policy.prompts[-1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "a", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": 3}]}, "input[0].output"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": CHAT_TOOLS}, "tools[0].name"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"instructions": []}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"metadata": []}, "metadata"),
        ({"stream": "yes"}, "stream"),
        ({"store": 1}, "store"),
    ],
)
def test_what_cannot_be_honoured_is_refused(shared_server: SessionServer, fields: Any, param: str) -> None:
    status, answer = posted(shared_server, shared_server.add(), "v1/responses", {"input": "hi", **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert shared_server.policy.prompts == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_said_so(server: SessionServer, stream: bool) -> None:
    status, answer = posted(server, server.add(), "v1/responses", {"input": "x" * 5000, "stream": stream})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == "input"


@pytest.mark.usefixtures("late_policy")
def test_a_stream_ends_with_its_failure(server: SessionServer) -> None:
    session = server.add()
    server.policy.fails = True
    status, events = posted(server, session, "v1/responses", {"input": "hi", "stream": True})
    assert status == 200
    assert [name for name, _ in events] == ["response.created", "response.in_progress", "response.failed"]
    response = events[-1][1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "engine_error")
    assert posted(server, session, "v1/responses", {"input": "hi"})[0] == 410


def test_input_tokens_are_those_of_the_prompt(server: SessionServer) -> None:
    session = server.add()
    body: dict[str, Any] = {"input": "hi", "instructions": "be short", "tools": TOOLS}
    for _ in range(2):
        status, count = posted(server, session, "v1/responses/input_tokens", body)
        response = posted(server, session, "v1/responses", body)[1]
        assert status == 200 and count["input_tokens"] == response["usage"]["input_tokens"]
        body = {**body, "previous_response_id": response["id"], "input": "and?"}
    assert len(server.policy.prompts) == 2
