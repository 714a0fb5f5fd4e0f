"""Which tokens of a conversation are learned."""

from __future__ import annotations

from typing import Any

import pytest

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.data import RowFormat
from areal_like.errors import ConfigError
from tests.support.chat_models import (
    APPENDING,
    NEVER_ENDING,
    STRIPPING,
    chat_tokenizer,
    llama_3_tokenizer,
    qwen3_tokenizer,
)

MARKED = APPENDING.replace(
    "{{ message.content }}", "{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{{ '<|end|>\n' }}{% endgeneration %}{% else %}{{ message.content }}<|end|>\n{% endif %}"
).replace("{%- endfor %}<|end|>\n{% endfor %}", "{%- endfor %}{% endfor %}")  # fmt: skip
USER = {"role": "user", "content": "hi"}
OTHER = {"role": "user", "content": "more?"}


def reply(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def rendered(tokenizer: Any, row: dict[str, Any], **template_kwargs: Any) -> list[str]:
    """The text of each sequence, with what is learned between ⟦ and ⟧."""
    rows = ConversationTokens(tokenizer, vocab_size=len(tokenizer), template_kwargs=template_kwargs)
    texts = []
    for sequence in rows.rows(RowFormat().conversation_of(row)):
        text, inside = "", 0
        for token, is_learned in zip(sequence.tokens, sequence.loss_mask, strict=True):
            text += "⟦" * (is_learned and not inside) + "⟧" * (inside and not is_learned)
            text += tokenizer.decode([token])
            inside = is_learned
        texts.append(text + "⟧" * inside)
    return texts


def test_replies_with_their_end_of_turn_are_learned() -> None:
    tokenizer = chat_tokenizer(APPENDING)
    row = {"messages": [USER, reply(" ab 7\n "), OTHER, reply("abc")]}
    assert rendered(tokenizer, row) == [
        "<|user|>hi<|end|>\n<|assistant|>⟦ ab 7\n <|end|>⟧\n<|user|>more?<|end|>\n<|assistant|>⟦abc<|end|>⟧"
    ]


def test_of_prompt_and_completion_the_completion_is_learned() -> None:
    tokenizer = chat_tokenizer(APPENDING)
    prompt = [USER, reply("no"), OTHER]
    want = "<|user|>hi<|end|>\n<|assistant|>no<|end|>\n<|user|>more?<|end|>\n<|assistant|>⟦yes<|end|>"
    assert rendered(tokenizer, {"prompt": prompt, "completion": [reply("yes")]}) == [want + "⟧"]
    assert rendered(chat_tokenizer(MARKED), {"prompt": prompt, "completion": [reply("yes")]}) == [
        want + "\n⟧"
    ]
    assert rendered(tokenizer, {"prompt": "2+2=", "completion": "4"}) == ["2+2=⟦4<|end|>⟧"]
    assert rendered(tokenizer, {"prompt": "2+2=", "completion": "4<|end|>"}) == ["2+2=⟦4<|end|>⟧"]


def test_blocks_of_the_template_decide_where_it_has_some() -> None:
    """Also for replies that begin or end with white space, of which a longer token is made."""
    row = {"messages": [USER, reply("7"), OTHER, reply(" ab ")]}
    assert rendered(chat_tokenizer(MARKED), row) == [
        "<|user|>hi<|end|>\n<|assistant|>⟦7<|end|>\n⟧<|user|>more?<|end|>\n<|assistant|>⟦ ab <|end|>\n⟧"
    ]


def test_tools_and_their_calls_are_rendered() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    row = {
        "messages": [USER, reply("", tool_calls=calls), {"role": "tool", "content": "7"}, reply("7")],
        "tools": tools,
    }
    (text,) = rendered(chat_tokenizer(APPENDING), row)
    assert text == (
        '<|system|>{"type": "function", "function": {"name": "add"}}\n<|end|>\n<|user|>hi<|end|>\n'
        '<|assistant|>⟦<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|end|>⟧\n'
        "<|tool|>7<|end|>\n<|assistant|>⟦7<|end|>⟧"
    )
    with pytest.raises(ConfigError, match="tool_calls: want OpenAI's format"):
        rendered(chat_tokenizer(APPENDING), {"messages": [USER, reply("", tool_calls=[{"name": "add"}])]})


def test_a_template_that_strips_reasoning_gives_sequences() -> None:
    row = {"messages": [USER, reply("7", reasoning_content="ab"), OTHER, reply("8", reasoning_content="abc")]}
    first = "<|user|>hi<|end|>\n<|assistant|>⟦<think>ab</think>7<|end|>⟧"
    assert rendered(chat_tokenizer(STRIPPING), row) == [
        first,
        "<|user|>hi<|end|>\n<|assistant|>7<|end|>\n<|user|>more?<|end|>\n<|assistant|>⟦<think>abc</think>8<|end|>⟧",
    ]
    qwen3 = rendered(qwen3_tokenizer(), row)
    assert len(qwen3) == 2 and qwen3[1].endswith("⟦<think>\nabc\n</think>\n\n8<|im_end|>⟧")
    assert "ab\n</think>" in qwen3[0] and "ab\n</think>" not in qwen3[1]


def test_end_of_turn_may_be_another_token_than_eos() -> None:
    """Base models often have the template of their chat models, and another EOS."""
    tokenizer = chat_tokenizer(
        APPENDING, special=("<|end|>", "<eos>", "<|user|>", "<|assistant|>"), eos="<eos>"
    )
    (text,) = rendered(tokenizer, {"messages": [USER, reply("abc")]})
    assert text.endswith("<|assistant|>⟦abc<|end|>⟧")
    (llama,) = rendered(llama_3_tokenizer(), {"messages": [USER, reply("abc")]}, date_string="1 May 2026")
    assert llama.startswith("<|begin_of_text|>") and llama.endswith("⟦abc<|eot_id|>⟧")


def test_a_template_without_ends_of_turns_warns(caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [USER, reply("7"), OTHER, reply("8")]}
    assert rendered(chat_tokenizer(NEVER_ENDING), row) == [
        "user: hi\nassistant: ⟦7\n⟧user: more?\nassistant: ⟦8\n⟧"
    ]
    assert caplog.text.count("will not learn to end its turns") == 1


def test_without_a_template_one_reply_is_learned() -> None:
    tokenizer = chat_tokenizer("")
    assert rendered(tokenizer, {"messages": [USER, reply("7")]}) == ["hi\n⟦7<|end|>⟧"]
    with pytest.raises(ConfigError, match="no chat template, which conversations of several"):
        rendered(tokenizer, {"messages": [USER, reply("7"), OTHER, reply("8")]})


@pytest.mark.parametrize(
    ("template", "message", "match"),
    [
        (
            APPENDING.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif"),
            reply("7"),
            "'.*<think>'",
        ),
        (
            APPENDING.replace("message.reasoning_content", "false"),
            reply("7", reasoning_content="a"),
            "leaves out",
        ),
        ("{{ raise_exception('no') }}", reply("7"), "cannot render these messages"),
    ],
)
def test_unfit_templates_are_refused(template: str, message: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        rendered(chat_tokenizer(template), {"messages": [USER, message]})
