"""Anthropic's Messages API in sessions, by plain requests; `tests/clients` has the `anthropic` package."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rollout_server.sessions.http.rules import most_bytes_of_body
from tests.support.session_requests import Events, posted, segments_of
from tests.support.session_server import SessionServer

TOOLS: Any = [
    {
        "name": "add",
        "description": "Adds.",
        "input_schema": {"type": "object", "properties": {}},
        "cache_control": {"type": "ephemeral"},
    }
]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
THOUGHT = "<think>so</think>"
HI: Any = [{"role": "user", "content": "hi"}]


def message_of(events: Events) -> dict[str, Any]:
    """The message, put together as clients do it."""
    message: dict[str, Any] = {}
    for name, event in events:
        match name:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                parts = list[str]()
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        parts.append(delta["partial_json"])
            case "content_block_stop" if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = json.loads("".join(parts))
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


def asked(server: SessionServer, session: Any, body: Any, *, stream: bool = False) -> dict[str, Any]:
    status, answer = posted(
        server, session, "v1/messages", {"max_tokens": 100, "model": "m", "stream": stream, **body}
    )
    assert status == 200, answer
    return message_of(answer) if stream else answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinks", ["shown", "dropped", "hidden"])
def test_tool_turns_are_one_segment(server: SessionServer, thinks: str, stream: bool) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}one{CALL}", f"{THOUGHT}{CALL}{CALL}", "done"]
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    options: dict[str, Any] = {"system": [{"type": "text", "text": "be short"}], "tools": TOOLS}
    if thinks != "hidden":
        options["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    for num_calls in (1, 2, 0):
        message = asked(server, session, {"messages": messages, **options}, stream=stream)
        content = message["content"]
        calls = [block for block in content if block["type"] == "tool_use"]
        assert len(calls) == num_calls and all(call["input"] == {"a": 1} for call in calls)
        assert message["stop_reason"] == ("tool_use" if num_calls else "end_turn")
        thoughts = [block["thinking"] for block in content if block["type"] == "thinking"]
        assert thoughts == (["so"] if num_calls and thinks != "hidden" else [])
        if thinks == "dropped":
            content = [block for block in content if block["type"] != "thinking"]
        results = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "3"}]}
            for call in calls
        ]
        extra = [{"type": "text", "text": "go on"}]
        messages = [
            *messages,
            {"role": "assistant", "content": content},
            {"role": "user", "content": [*results, *extra]},
        ]
    assert message["content"] == [{"type": "text", "text": "done"}]
    assert message["usage"]["input_tokens"] == len(server.policy.prompts[-1])
    assert message["usage"]["output_tokens"] == len("done") + 1
    assert segments_of(server, session) == 1 and len(session.conversation.turns) == 3
    roles = [one["role"] for one in session.conversation.turns[-1].messages]
    assert roles == ["system", "user", "assistant", "tool", "user", "assistant", "tool", "tool", "user",
                     "assistant"]  # fmt: skip


def test_events_have_the_documented_order(server: SessionServer) -> None:
    session = server.add()
    server.policy.texts = [f"{THOUGHT}I add:{CALL}"]
    body = {"messages": HI, "tools": TOOLS, "stream": True, "thinking": {"type": "adaptive"}}
    status, events = posted(server, session, "v1/messages", body)
    start, delta, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert status == 200
    assert [name for name, _ in events] == [
        "message_start", "ping", start, delta, delta, stop, start, delta, stop, start, delta, stop,
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [event["index"] for _, event in events if "index" in event] == [0] * 4 + [1] * 3 + [2] * 3
    first = events[0][1]["message"]
    assert (first["content"], first["stop_reason"], first["usage"]["output_tokens"]) == ([], None, 0)
    assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "reason", "text", "sequence"),
    [
        ("ok", "end_turn", "ok", None),
        ("ok END\\", "stop_sequence", "ok END", "END"),
        ("abcdefghijk", "max_tokens", "abcdefgh", None),
        ("", "end_turn", "", None),
        (f"{CALL[:11]}x", "end_turn", f"{CALL[:11]}x", None),
    ],
)
def test_reasons_of_stops(
    server: SessionServer, said: str, reason: str, text: str, sequence: str | None, stream: bool
) -> None:
    session = server.add()
    server.policy.texts = [said]
    body = {"messages": HI, "stop_sequences": ["NOT", "END"], "max_tokens": 8}
    message = asked(server, session, body, stream=stream)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    assert message["content"] == [{"type": "text", "text": text}]
    assert server.policy.samplings[-1].stop == ("NOT", "END")


def test_the_system_prompt_has_no_changing_line(server: SessionServer) -> None:
    session = server.add()
    messages = [*HI]
    for number in range(2):
        line = f"x-anthropic-billing-header: cc_version=2.1; cch={number};"
        system = [
            {"type": "text", "text": line},
            {"type": "text", "text": "be"},
            {"type": "text", "text": "short"},
        ]
        message = asked(server, session, {"messages": messages, "system": system})
        messages += [{"role": "assistant", "content": message["content"]}, *HI]
    assert segments_of(server, session) == 1
    assert session.conversation.turns[0].messages[0]["content"] == "be\n\nshort"


def test_counted_tokens_are_those_of_the_prompt(server: SessionServer) -> None:
    session = server.add()
    body = {"messages": HI, "system": "be short", "tools": TOOLS}
    before = session.num_heard
    status, count = posted(server, session, "v1/messages/count_tokens", body)
    assert status == 200 and session.num_heard == before + 1
    assert count == {"input_tokens": asked(server, session, body)["usage"]["input_tokens"]}
    ends_with_assistant = {"messages": [*HI, {"role": "assistant", "content": "ok"}]}
    assert posted(server, session, "v1/messages/count_tokens", ends_with_assistant)[0] == 200
    assert len(server.policy.prompts) == len(session.conversation.turns) == 1


def test_a_repeated_request_is_one_turn(server: SessionServer) -> None:
    session = server.add()
    body = {"messages": HI, "max_tokens": 9}
    first = posted(server, session, "v1/messages", body)[1]
    again = posted(server, session, "v1/messages", body, {"x-stainless-retry-count": "1"})[1]
    assert first == again and len(session.conversation.turns) == 1
    reward = {"reward": 1, "completion_id": first["id"]}
    assert posted(server, session, "reward", reward)[0] == 200
    assert server.call(session.finish) == [1.0]


def test_numbers_that_json_lacks_are_texts(server: SessionServer) -> None:
    session = server.add()
    said = '<tool_call>{"name": "add", "arguments": {"a": NaN, "b": 1e999}}</tool_call>'
    server.policy.texts = [said, "oh"]
    message = asked(server, session, {"messages": HI, "tools": TOOLS})
    assert message["content"][0]["input"] == {"a": "NaN", "b": "Infinity"}
    result = {"type": "tool_result", "tool_use_id": message["content"][0]["id"], "content": "no numbers"}
    messages = [
        *HI,
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result]},
    ]
    asked(server, session, {"messages": messages, "tools": TOOLS})
    assert segments_of(server, session) == 1


def test_fields_without_effect_are_counted(server: SessionServer) -> None:
    session = server.add()
    ignored = {"temperature": 0.1, "top_k": 3, "service_tier": "auto", "output_config": {"effort": "low"}}
    body = {"messages": HI, "tools": TOOLS, "tool_choice": {"type": "none"}, "metadata": {"user_id": "x"}}
    asked(server, session, {**body, **ignored, "max_tokens": 9})
    assert set(server.book.num_ignored) == set(ignored)
    sampling = server.policy.samplings[-1]
    assert (sampling.temperature, sampling.max_new_tokens) == (1.0, 9)
    assert "add" not in server.renderer.decode(server.policy.prompts[-1])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": None}, "messages must be"),
        ({"messages": []}, "messages must be"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role user or assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "'tool_use'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]},
                    *HI,
                ]
            },
            "input must be an object",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": "The sum is"}]}, "prefill"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "input_schema"),
        ({"tools": [{"name": "add"}]}, "input_schema"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": True}, "thinking"),
        ({"tool_choice": "auto"}, "tool_choice"),
        (b"{", "not JSON"),
    ],
)
def test_what_cannot_be_honoured_is_refused(shared_server: SessionServer, fields: Any, says: str) -> None:
    body = fields if isinstance(fields, bytes) else {"messages": HI, **fields}
    status, answer = posted(shared_server, shared_server.add(), "v1/messages", body)
    assert (status, answer["type"], set(answer["error"])) == (400, "error", {"type", "message"})
    assert answer["error"]["type"] == "invalid_request_error" and says in answer["error"]["message"]
    assert shared_server.policy.prompts == []


def test_errors_have_the_format_of_the_api(server: SessionServer) -> None:
    session = server.add()

    def error_of(path: str, body: Any, **options: Any) -> tuple[int, str, str]:
        status, answer = posted(server, session, path, body, **options)
        return status, answer["error"]["type"], answer["error"]["message"]

    long = {"messages": [{"role": "user", "content": "x" * 5000}]}
    assert error_of("v1/messages", long)[:2] == (400, "invalid_request_error")
    assert error_of("v1/messages", long)[2].startswith("prompt is too long: ")
    assert error_of("v1/messages/batches", {})[:2] == (404, "not_found_error")
    assert error_of("v1/messages", b"", method="GET")[:2] == (405, "invalid_request_error")
    server.policy.fails = True
    assert error_of("v1/messages", {"messages": HI})[:2] == (500, "api_error")
    assert error_of("v1/messages", {"messages": HI})[:2] == (410, "invalid_request_error")


@pytest.mark.usefixtures("late_policy")
@pytest.mark.parametrize("fails", [False, True])
def test_a_late_stream_is_complete(server: SessionServer, fails: bool) -> None:
    session = server.add()
    server.policy.fails = fails
    status, events = posted(server, session, "v1/messages", {"messages": HI, "stream": True})
    assert status == 200
    if fails:
        ((name, event),) = events
        assert name == "error" and event["error"]["type"] == "api_error"
    else:
        assert message_of(events)["content"] == [{"type": "text", "text": "ok"}]


def test_the_version_may_be_left_out_of_the_path(server: SessionServer) -> None:
    """Vercel's SDK appends only `/messages` to the base URL of Anthropic."""
    session = server.add()
    assert posted(server, session, "messages", {"messages": HI})[1]["type"] == "message"
    assert posted(server, session, "messages/count_tokens", {"messages": HI})[0] == 200
    status, answer = posted(server, session, "messages", {"messages": []})
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")


def test_prompts_of_every_api_may_be_large() -> None:
    routes = ("chat/completions", "responses", "responses/input_tokens", "messages", "messages/count_tokens")
    for route in routes:
        assert most_bytes_of_body({"path": f"/sessions/1/v1/{route}"}, of_prompts=1 << 20) == 1 << 20
    assert most_bytes_of_body({"path": "/sessions/1/v1/reward"}, of_prompts=1 << 20) == 1 << 16
