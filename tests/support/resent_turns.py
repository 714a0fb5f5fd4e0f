"""How frameworks send three turns with tool calls back: data, written after their serializers.

The policy says `SAID`; the response of its first turn has `content` "I add.", the reasoning "hm", and the
call `call00000` of `add` with the arguments `{"b": 2.0, "a": 1}`. Each framework has the messages that
it appends to the conversation after each turn.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

SAID = (
    '<think>hm</think>I add.<tool_call>{"name": "add", "arguments": {"b": 2.0, "a": 1}}</tool_call>',
    '<tool_call>{"name": "find", "arguments": {"text": "caf\\u00e9", '
    '"limits": {"9": 1e3, "2": null}}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    "Done.",
)
ADD, FIND = '{"b": 2.0, "a": 1}', '{"text": "café", "limits": {"9": 1000.0, "2": null}}'
"""Arguments as the server sends them."""
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("add", "find", "now")
]
ADD_JS, FIND_JS = '{"b":2,"a":1}', '{"text":"café","limits":{"2":null,"9":1000}}'
"""Parsed and written by JavaScript: keys that are integers come first, and in their order."""


def _call(id: str, name: str, arguments: Any, **more: Any) -> Message:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def _said(content: Any, *calls: Message, **more: Any) -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def _result(id: str, content: Any, **more: Any) -> Message:
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


_RESULTS = (_result("call00000", "3"), _result("call00001", "[]"), _result("call00002", "noon"))
_OPENAI: Message = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
_LITELLM: Message = {
    "function_call": None,
    "provider_specific_fields": {"refusal": None, "reasoning_content": "hm"},
}

RESENT: dict[str, list[tuple[Message, ...]]] = {
    # messages.append(response.choices[0].message); the fields of the response, in the order of the class.
    "openai (Python), langgraph by hand": [
        (
            {
                "content": "I add.",
                "refusal": None,
                "role": "assistant",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "call00000", "function": {"arguments": ADD, "name": "add"}, "type": "function"}
                ],
            },
            _RESULTS[0],
        ),
        (
            {
                "content": None,
                "refusal": None,
                "role": "assistant",
                "tool_calls": [
                    {"id": "call00001", "function": {"arguments": FIND, "name": "find"}, "type": "function"}
                ],
            },
            _RESULTS[1],
        ),
        (
            {
                "content": None,
                "refusal": None,
                "role": "assistant",
                "tool_calls": [
                    {"id": "call00002", "function": {"arguments": "{}", "name": "now"}, "type": "function"}
                ],
            },
            _RESULTS[2],
        ),
    ],
    # message.model_dump(): every field of the class.
    "openai (Python), model_dump": [
        (_said("I add.", _call("call00000", "add", ADD), reasoning_content="hm", **_OPENAI), _RESULTS[0]),
        (_said(None, _call("call00001", "find", FIND), **_OPENAI), _RESULTS[1]),
        (_said(None, _call("call00002", "now", "{}"), **_OPENAI), _RESULTS[2]),
    ],
    # client.chat.completions.parse: with what it has parsed.
    "openai (Python), parse": [
        (
            _said(
                "I add.",
                {
                    "id": "call00000",
                    "type": "function",
                    "function": {"name": "add", "arguments": ADD, "parsed_arguments": {"b": 2.0, "a": 1}},
                },
                parsed=None,
                refusal=None,
            ),
            _RESULTS[0],
        ),
        (_said(None, _call("call00001", "find", FIND), parsed=None, refusal=None), _RESULTS[1]),
        (_said(None, _call("call00002", "now", "{}"), parsed=None, refusal=None), _RESULTS[2]),
    ],
    # A call assembled from the chunks of a stream has its index.
    "openai (Python), stream": [
        (_said("I add.", _call("call00000", "add", ADD, index=0)), _RESULTS[0]),
        (_said("", _call("call00001", "find", FIND, index=0)), _RESULTS[1]),
        (_said("", _call("call00002", "now", "{}", index=0)), _RESULTS[2]),
    ],
    # messages.push(response.choices[0].message)
    "openai (Node)": [
        (_said("I add.", _call("call00000", "add", ADD), refusal=None, reasoning_content="hm"), _RESULTS[0]),
        (_said(None, _call("call00001", "find", FIND), refusal=None), _RESULTS[1]),
        (_said(None, _call("call00002", "now", "{}"), refusal=None), _RESULTS[2]),
    ],
    # Written by hand, with as little as possible.
    "curl": [
        (_said("I add.", _call("call00000", "add", ADD)), _RESULTS[0]),
        ({"role": "assistant", "tool_calls": [_call("call00001", "find", FIND)]}, _RESULTS[1]),
        ({"role": "assistant", "tool_calls": [_call("call00002", "now", "{}")]}, _RESULTS[2]),
    ],
    # json.dumps(args, ensure_ascii=False) of the parsed arguments; null for an empty content.
    "langchain-openai, langgraph": [
        (_said("I add.", _call("call00000", "add", ADD)), _result("call00000", "3")),
        (_said(None, _call("call00001", "find", FIND)), _result("call00001", "[]")),
        (_said(None, _call("call00002", "now", "{}")), _result("call00002", "noon")),
    ],
    # Its own message class, with fields of the provider.
    "litellm": [
        (
            _said("I add.", _call("call00000", "add", ADD), reasoning_content="hm", **_LITELLM),
            _result("call00000", "3", name="add"),
        ),
        (_said(None, _call("call00001", "find", FIND), **_LITELLM), _result("call00001", "[]", name="find")),
        (_said(None, _call("call00002", "now", "{}"), **_LITELLM), _result("call00002", "noon", name="now")),
    ],
    # Results have the tool's name.
    "crewai": [
        (_said("I add.", _call("call00000", "add", ADD)), _result("call00000", "3", name="add")),
        (_said(None, _call("call00001", "find", FIND)), _result("call00001", "[]", name="find")),
        (_said(None, _call("call00002", "now", "{}")), _result("call00002", "noon", name="now")),
    ],
    # OpenAIChatCompletionsModel.
    "openai-agents": [
        (_said("I add.", _call("call00000", "add", ADD)), _result("call00000", "3")),
        (_said(None, _call("call00001", "find", FIND)), _result("call00001", "[]")),
        (_said(None, _call("call00002", "now", "{}")), _result("call00002", "noon")),
    ],
    # OpenAIChatModel: arguments that were parsed are written without spaces.
    "pydantic-ai": [
        (
            _said("I add.", _call("call00000", "add", '{"b":2.0,"a":1}'), reasoning_content="hm"),
            _result("call00000", "3"),
        ),
        (
            _said(None, _call("call00001", "find", '{"text":"café","limits":{"9":1000.0,"2":null}}')),
            _result("call00001", "[]"),
        ),
        (_said(None, _call("call00002", "now", "{}")), _result("call00002", "noon")),
    ],
    # @ai-sdk/openai-compatible: JSON.stringify of the parsed arguments, an empty text in place of null.
    "Vercel ai": [
        (_said("I add.", _call("call00000", "add", ADD_JS)), _result("call00000", "3")),
        (_said("", _call("call00001", "find", FIND_JS)), _result("call00001", "[]")),
        (_said("", _call("call00002", "now", "{}")), _result("call00002", "noon")),
    ],
    # Other ids: those of its own messages.
    "LangChain.js": [
        (
            _said("I add.", _call("run-1_0", "add", ADD_JS)),
            _result("run-1_0", [{"type": "text", "text": "3"}], name="add"),
        ),
        (_said("", _call("run-2_0", "find", FIND_JS)), _result("run-2_0", "[]", name="find")),
        (_said("", _call("run-3_0", "now", "{}")), _result("run-3_0", "noon", name="now")),
    ],
    # Assistant messages have the agent's name.
    "autogen-agentchat": [
        (_said("I add.", _call("call00000", "add", ADD), name="assistant"), _result("call00000", "3")),
        (_said(None, _call("call00001", "find", FIND), name="assistant"), _result("call00001", "[]")),
        (_said(None, _call("call00002", "now", "{}"), name="assistant"), _result("call00002", "noon")),
    ],
    # Arguments as an object, as Ollama's clients have them; the text as a list of parts.
    "arguments as an object": [
        (
            _said([{"type": "text", "text": "I add."}], _call("call00000", "add", {"a": 1, "b": 2})),
            _RESULTS[0],
        ),
        (
            _said([], _call("call00001", "find", {"limits": {"2": None, "9": 1000}, "text": "café"})),
            _RESULTS[1],
        ),
        (_said(None, _call("call00002", "now", "")), _RESULTS[2]),
    ],
}

REWRITTEN: dict[str, list[tuple[Message, ...]]] = {
    # Its history: the calls are text, and so are their results.
    "smolagents, ToolCallingAgent": [
        (
            {"role": "assistant", "content": "I add.\nCalling tools:\n[{'id': 'call00000', 'name': 'add'}]"},
            {"role": "user", "content": "Observation:\n3"},
        ),
        (
            {"role": "assistant", "content": "Calling tools:\n[{'id': 'call00001', 'name': 'find'}]"},
            {"role": "user", "content": "Observation:\n[]"},
        ),
        (
            {"role": "assistant", "content": "Calling tools:\n[{'id': 'call00002', 'name': 'now'}]"},
            {"role": "user", "content": "Observation:\nnoon"},
        ),
    ],
    # Other arguments than the policy wrote: a default was added.
    "arguments that were changed": [
        (_said("I add.", _call("call00000", "add", '{"a": 1, "b": 2, "c": 0}')), _RESULTS[0]),
        (_said(None, _call("call00001", "find", '{"text": "cafe", "limits": {}}')), _RESULTS[1]),
        (_said(None, _call("call00002", "now", '{"zone": "UTC"}')), _RESULTS[2]),
    ],
}
"""Each request begins a segment, because what the policy would read is not what it has said."""
