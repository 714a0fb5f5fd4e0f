"""Conversations of Qwen3 and Llama 3 by the package `renderers`: bridges, and replies however malformed."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.environments.base import Message
from rollout_server.rendering.jinja import JinjaRenderer
from rollout_server.rendering.library import LibraryRenderer
from tests.support.chat_models import llama_3_tokenizer, options_of, qwen3_tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
USER: Message = {"role": "user", "content": "1+1"}
QWEN3 = qwen3_tokenizer()


def qwen3(**template_kwargs: Any) -> LibraryRenderer:
    return LibraryRenderer(QWEN3, name="qwen3", **options_of(QWEN3, **template_kwargs))


def ids_of(renderer: LibraryRenderer, text: str) -> list[int]:
    return list(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_tool_cycle_is_bridged_and_a_new_question_is_not() -> None:
    renderer = qwen3()
    said = (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    prompt, completion = renderer.render([USER], tools=[TOOL]), ids_of(renderer, said)
    parsed = renderer.parse(completion, prompt_ids=prompt, tools=[TOOL])
    [call] = parsed.tool_calls
    assert (parsed.text, parsed.reasoning.strip()) == ("", "hm")
    assert (call.name, call.arguments) == ("add", '{"a": 1}')
    reply: Message = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    answer: Message = {"role": "tool", "tool_call_id": "1", "content": "2"}
    tail = renderer.bridge(prompt, completion, [USER, reply], [answer], tools=[TOOL])
    assert tail is not None
    template = JinjaRenderer(QWEN3, **options_of(QWEN3))
    whole = template.render([USER, reply, answer], tools=[TOOL])
    assert [*prompt, *completion, *tail] == whole == renderer.render([USER, reply, answer], tools=[TOOL])
    # The chat template strips the reasoning before a new question.
    question: Message = {"role": "user", "content": "and?"}
    assert renderer.bridge(prompt, completion, [USER, reply], [question], tools=[TOOL]) is None
    assert template.bridge(prompt, completion, [USER, reply], [question], tools=[TOOL]) is None


def test_without_thinking_questions_are_bridged() -> None:
    renderer = qwen3(enable_thinking=False)
    prompt, completion = renderer.render([USER]), ids_of(renderer, "2<|im_end|>")
    reply: Message = {"role": "assistant", "content": "2"}
    tail = renderer.bridge(prompt, completion, [USER, reply], [{"role": "user", "content": "and?"}])
    assert renderer.decode(tail or []) == (
        "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("said", "name", "arguments"),
    [
        (
            '<tool_call>{"name": "add", "arguments": {"a": }</tool_call>',
            "",
            '{"name": "add", "arguments": {"a": }',
        ),
        ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', "", '{"name": 7, "arguments": {}}'),
        ('<tool_call>{"name": "add", "arguments": 1}</tool_call>', "add", '{"name": "add", "arguments": 1}'),
        ('<tool_call>{"name": "add"', "", '{"name": "add"'),
    ],
)
def test_malformed_calls_keep_their_text(said: str, name: str, arguments: str) -> None:
    renderer = qwen3()
    [call] = renderer.parse(ids_of(renderer, said), prompt_ids=renderer.render([USER])).tool_calls
    assert (call.name, call.arguments) == (name, arguments)


@pytest.mark.parametrize("reasoning", ["", "<think>\nI add\n</think>\n\n"])
def test_calls_can_be_left_in_the_text(reasoning: str) -> None:
    renderer = qwen3()
    said = 'so: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    completion = ids_of(renderer, f"{reasoning}{said}<|im_end|>")
    parsed = renderer.parse_text(completion, prompt_ids=renderer.render([USER]))
    assert (parsed.text, parsed.tool_calls) == (said, ())
    assert parsed.reasoning.strip() == ("I add" if reasoning else "")


def test_a_reply_that_cannot_be_parsed_is_text() -> None:
    renderer = qwen3()
    said = f"<tool_call>{'[' * 5000}</tool_call><|im_end|>"
    parsed = renderer.parse(ids_of(renderer, said), prompt_ids=renderer.render([USER]))
    assert "[[[[" in parsed.text + "".join(call.arguments for call in parsed.tool_calls)


def test_llama_3_agrees_with_its_template_for_one_date() -> None:
    tokenizer = llama_3_tokenizer()
    renderer = LibraryRenderer(tokenizer, name="llama-3", **options_of(tokenizer, date_string="01 Jan 2030"))
    template = JinjaRenderer(tokenizer, **options_of(tokenizer, date_string="01 Jan 2030"))
    messages: list[Message] = [
        USER,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and?"},
    ]
    assert renderer.difference() == ""
    assert renderer.render(messages) == template.render(messages)
    assert "01 Jan 2030" in renderer.decode(renderer.render(messages))
    prompt, completion = renderer.render(messages[:1]), ids_of(renderer, "2<|eot_id|>")
    for one in (renderer, template):
        tail = one.bridge(prompt, completion, messages[:2], messages[2:])
        assert [*prompt, *completion, *(tail or [])] == renderer.render(messages)
