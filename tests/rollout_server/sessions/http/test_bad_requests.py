"""Whatever is sent: an error in the format of the API, never status 500."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_server.sessions.open_session import OpenSession
from tests.support.session_server import SessionServer

HI = [{"role": "user", "content": "hi"}]


class Client:
    """Requests to one session."""

    def __init__(self, server: SessionServer) -> None:
        self.server = server
        self.session: OpenSession = server.add(max_new_tokens=4)
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port)

    def post(self, body: Any, *, path: str = "v1/chat/completions", method: str = "POST") -> tuple[int, Any]:
        """Status and answer; errors have the format, and tell an SDK not to try again."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.close()  # the server closes it if it is idle while an example is made
        self.connection.request(method, f"/sessions/{self.session.id}/{path}", content)
        response = self.connection.getresponse()
        answer = response.read()
        if response.headers["Content-Type"].startswith("text/event-stream"):
            return response.status, answer
        answer = json.loads(answer)
        if response.status != 200:
            is_anthropic = path.startswith("v1/messages")
            wanted = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
            assert set(answer["error"]) == wanted and is_anthropic == (answer.get("type") == "error")
            assert answer["error"]["message"] and response.headers["x-should-retry"] == "false"
        return response.status, answer


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with SessionServer(max_turns=1 << 30).serving() as server:
        made = Client(server)
        yield made
        made.connection.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"messages": \xff}', "UTF-8"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "\\UD800"}]}', "not JSON"),
        (b'{"messages": ' + b"[" * 5000, "not JSON"),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "levels deep"),
        (b'{"messages": 1' + b"0" * 5000 + b"}", "not JSON"),
        ({}, "messages must be"),
        ({"messages": []}, "messages must be"),
        ({"messages": HI * 5000}, "messages must be"),
        ({"messages": ["hi"]}, r"messages[0] must be an object"),
        ({"messages": [{"content": "hi"}]}, "with a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "images",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "function"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls must be"),
        ({"messages": HI, "tools": [{"type": "custom"}]}, "tools[0]"),
        ({"messages": HI, "tools": {"a": 1}}, "tools must be"),
        ({"messages": HI, "functions": [{"name": "f"}]}, "use tools"),
        ({"messages": HI, "stop": ""}, "stop must be"),
        ({"messages": HI, "stop": ["x"] * 17}, "stop must be"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": "5"}, "max_tokens"),
        ({"messages": HI, "stream": "yes"}, "stream must be"),
        ({"messages": HI, "stream": True, "stream_options": 3}, "stream_options"),
        ({"messages": HI, "model": 3}, "model"),
        ({"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": "hi", "x": 1 << 80}]}, "JSON"),
    ],
)
def test_a_malformed_request_is_refused(client: Client, body: Any, says: str) -> None:
    status, answer = client.post(body)
    assert status == 400 and says in answer["error"]["message"]
    assert client.server.policy.prompts == []


def test_other_paths_say_what_is_there(client: Client) -> None:
    for path in ("v1/responses/", "v1/conversations", "v1/embeddings", "x", "end/", "v1/chat/completions/"):
        status, answer = client.post({}, path=path)
        assert status == 404 and "chat/completions" in answer["error"]["message"]
    assert client.post(b"", method="GET")[0] == 405


@pytest.mark.parametrize(
    "body", [{}, {"reward": None}, {"reward": "1"}, {"reward": True}, {"reward": 10**400}, {"reward": [1]},
             {"reward": 1, "completion_id": 3}, {"reward": 1, "completion_id": "x"}, b'{"reward": NaN}', b"x"]
)  # fmt: skip
def test_a_wrong_reward_is_refused(client: Client, body: Any) -> None:
    assert client.post(body, path="reward")[0] == 400
    assert client.session.reward is None


def test_an_unknown_session_is_not_found(client: Client) -> None:
    client.connection.close()
    client.connection.request("POST", "/sessions/1-2-3/v1/chat/completions", b"{}")
    response = client.connection.getresponse()
    assert response.status == 404
    assert json.loads(response.read())["error"]["code"] == "session_not_found"


def test_a_session_after_its_end_is_gone(client: Client) -> None:
    other = Client(client.server)
    assert other.post({}, path="end")[0] == other.post({}, path="v1/end")[0] == 200
    status, answer = other.post({"messages": HI})
    assert status == 410 and answer["error"]["code"] == "session_gone"
    client.server.call(lambda: client.server.book.remove(other.session))
    for path in ("v1/chat/completions", "v1/reward"):
        assert other.post({"messages": HI, "reward": 1}, path=path)[0] == 410
    assert other.post({}, path="end")[0] == 200, "a repetition, whose first response may be lost"
    other.connection.close()


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.text(max_size=8) | st.sampled_from(["hi", "<tool_call>", "<|end|>"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}) | JSONS, max_size=2)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS}, optional={"arguments": TEXTS | JSONS}) | JSONS},
    optional={"id": TEXTS | JSONS, "type": JSONS, "index": JSONS},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | TEXTS | JSONS},
    optional={
        "content": TEXTS | PARTS | JSONS,
        "tool_calls": st.lists(CALLS | JSONS, max_size=2) | JSONS,
        "reasoning_content": TEXTS | JSONS,
        "reasoning": TEXTS | JSONS,
        "name": JSONS,
        "refusal": JSONS,
        "tool_call_id": TEXTS | JSONS,
    },
)
FIELDS = (
    "model tools tool_choice stop stream stream_options max_tokens max_completion_tokens temperature n "
    "logprobs modalities response_format functions audio return_token_ids"
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES | JSONS, max_size=4) | JSONS},
    optional=dict.fromkeys(FIELDS.split(), JSONS),
)
CONTENTS = TEXTS | JSONS | st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["text", "input_text", "tool_use", "tool_result", "thinking", "image"])
            | JSONS
        },
        optional={
            "text": TEXTS,
            "id": TEXTS | JSONS,
            "name": TEXTS | JSONS,
            "input": st.dictionaries(TEXTS, JSONS, max_size=2) | JSONS,
            "tool_use_id": TEXTS | JSONS,
            "content": TEXTS | PARTS | JSONS,
            "thinking": TEXTS | JSONS,
        },
    )
    | JSONS,
    max_size=3,
)  # fmt: skip
ITEMS = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["message", "reasoning", "function_call", "function_call_output", "item_reference"]
        )
        | JSONS
    },
    optional={
        "role": st.sampled_from(["user", "assistant"]) | JSONS,
        "content": CONTENTS,
        "call_id": TEXTS | JSONS,
        "id": TEXTS | JSONS,
        "name": TEXTS | JSONS,
        "arguments": TEXTS | JSONS,
        "output": CONTENTS,
    },
)
RESPONSES_FIELDS = (
    "model tools tool_choice instructions stream store include metadata max_output_tokens text truncation "
    "previous_response_id background conversation"
)
RESPONSES_BODIES = st.fixed_dictionaries(
    {"input": TEXTS | st.lists(ITEMS | JSONS, max_size=4) | JSONS},
    optional=dict.fromkeys(RESPONSES_FIELDS.split(), JSONS),
)
MESSAGES_FIELDS = "model tools tool_choice stream max_tokens stop_sequences thinking metadata mcp_servers"
MESSAGES_BODIES = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENTS})
            | JSONS,
            max_size=4,
        )
        | JSONS
    },
    optional={**dict.fromkeys(MESSAGES_FIELDS.split(), JSONS), "system": CONTENTS},
)


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("v1/chat/completions", BODIES),
        ("v1/responses", RESPONSES_BODIES),
        ("v1/responses/input_tokens", RESPONSES_BODIES),
        ("v1/messages", MESSAGES_BODIES),
        ("v1/messages/count_tokens", MESSAGES_BODIES),
    ],
)
@given(data=st.data(), cut=st.none() | st.integers(0, 200))
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_no_body_makes_a_server_error(
    client: Client, path: str, bodies: st.SearchStrategy[Any], data: st.DataObject, cut: int | None
) -> None:
    # `json` writes NaN and halves of surrogate pairs, as some clients do.
    client.session = client.server.add(max_new_tokens=4)
    assert client.post(json.dumps(data.draw(bodies)).encode()[:cut], path=path)[0] in (200, 400)
    client.server.call(lambda: client.server.book.remove(client.session))
