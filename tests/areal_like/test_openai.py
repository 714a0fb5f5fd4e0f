"""One codec for two servers: what they have in common, and what each takes."""

from __future__ import annotations

from typing import Any

import pytest

from areal_like.chat.openai import ChatRules, parse_chat
from areal_like.http.bodies import ParamError
from rollout_server.engine.http.chat import RULES as ENGINE
from rollout_server.sessions.http.formats import session_rules

SESSIONS = session_rules("policy")
BOTH = pytest.mark.parametrize("rules", [ENGINE, SESSIONS], ids=lambda rules: rules.server)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "index": 0, "function": {"name": "add", "arguments": "{}"}}


@BOTH
def test_texts_and_parts_of_texts_are_the_same(rules: ChatRules) -> None:
    parts = {"role": "developer", "content": ["h", {"type": "text", "text": "i"}], "refusal": None}
    chat = parse_chat({"messages": [parts, USER], "stop": "x", "max_tokens": 5}, rules)
    assert chat.messages == [{"role": "system", "content": "hi"}, USER]
    assert chat.options.stop == ("x",) and chat.options.max_new_tokens == 5
    assert chat.options.model == rules.default_model


@BOTH
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stream": 1}, "stream"),
        ({"stream_options": 3}, "stream_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_errors_name_the_field(rules: ChatRules, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ParamError) as caught:
        parse_chat({"messages": [USER], **fields}, rules)
    assert caught.value.param == param


def test_only_sessions_take_tools_and_ignore_sampling() -> None:
    body = {
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "frequency_penalty": 1,
    }
    chat = parse_chat(body, SESSIONS)
    assert chat.tools == body["tools"] and chat.options.ignored == ("frequency_penalty",)
    assert "index" not in chat.messages[1]["tool_calls"][0]
    for name in ("tools", "frequency_penalty"):
        with pytest.raises(ParamError, match=f"{name} is not supported by the embedded engine"):
            parse_chat({"messages": [USER], name: body[name]}, ENGINE)
    with pytest.raises(ParamError, match="tool_calls is not supported by the embedded engine"):
        parse_chat({"messages": [{**USER, "tool_calls": [CALL]}]}, ENGINE)
