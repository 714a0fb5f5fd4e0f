"""Prompts, answers, labels and conversations of the usual rows, unchanged."""

from __future__ import annotations

import pytest

from areal_like.data import RowFormat
from areal_like.errors import ConfigError

USER, REPLY = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be short."}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0},
}


def test_usual_rows_need_no_keys() -> None:
    read = RowFormat()
    assert (read.prompt_of(VERL), read.answer_of(VERL), read.label_of(VERL)) == ([USER], "2", "openai/gsm8k")
    trl = {"prompt": "1+1?", "solution": ["2"]}
    assert (read.prompt_of(trl), read.answer_of(trl), read.label_of(trl)) == ("1+1?", ["2"], "")
    assert read.prompt_of({"prompt": [USER]}) == [USER] and read.answer_of({"prompt": [USER]}) is None
    plain = {"question": "1+1?", "answer": 0}
    assert (read.prompt_of(plain), read.answer_of(plain)) == ("1+1?", 0)
    chat = {"messages": [SYSTEM, USER, REPLY]}
    assert (read.prompt_of(chat), read.answer_of(chat)) == ([SYSTEM, USER], "2")


def test_configured_keys_and_prompts() -> None:
    read = RowFormat(prompt_key="in.text", answer_key="a.b", label_key="level", system_prompt="Be short.")
    row = {"in": {"text": "1+1?"}, "a.b": 2, "level": 3}
    assert read.prompt_of(row) == [SYSTEM, USER]
    assert (read.answer_of(row), read.label_of(row)) == (2, "3")
    own = {"role": "system", "content": "Be long."}
    assert read.prompt_of({"in": {"text": [own, USER]}}) == [own, USER]
    assert RowFormat(chat=True).prompt_of({"prompt": "1+1?"}) == [USER]
    filled = {"role": "user", "content": "1+1?", "tool_calls": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}
    assert RowFormat().prompt_of({"prompt": [filled]}) == RowFormat().prompt_of({"prompt": [parts]}) == [USER]


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({}, {"text": "x"}, r"none of the keys prompt, .*: set prompt_key; the row has text"),
        ({"prompt_key": "q"}, {"prompt": "x"}, r"no `q` \(prompt_key\); the row has prompt"),
        ({"answer_key": "a"}, {"prompt": "x", "a": None}, "no `a`"),
        ({}, {"prompt": 3}, "want a text or a list of messages, got int"),
        ({}, {"prompt": []}, "got list"),
        ({}, {"prompt": " "}, "is empty"),
        ({}, {"prompt": [{"content": "x"}]}, "needs `role` and `content`"),
        ({}, {"prompt": [{"role": "user"}]}, "has no content"),
        ({}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "must be text"),
        ({}, {"messages": [REPLY]}, "no message before"),
        ({"label_key": "l"}, {"prompt": "x", "l": "x" * 65}, "up to 64"),
        ({"label_key": "l"}, {"prompt": "x", "l": "a\nb"}, "printable"),
    ],
)
def test_wrong_row_says_what_is_wrong(settings: dict[str, str], row: dict[str, object], message: str) -> None:
    read = RowFormat(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        read.prompt_of(row), read.answer_of(row), read.label_of(row)


def test_conversations_learn_the_assistants_messages() -> None:
    read = RowFormat(system_prompt="Be short.")
    chat = read.conversation_of({"messages": [USER, REPLY, USER, REPLY], "tools": [{"type": "function"}]})
    assert chat.messages == [SYSTEM, USER, REPLY, USER, REPLY] and chat.tools == [{"type": "function"}]
    assert chat.is_learned == [False, False, True, False, True] and not chat.is_text
    trl = RowFormat().conversation_of({"prompt": [USER, REPLY, USER], "completion": [REPLY]})
    assert (trl.messages, trl.is_learned) == ([USER, REPLY, USER, REPLY], [False, False, False, True])
    text = RowFormat().conversation_of({"question": "1+1?", "answer": "2"})
    assert (text.messages, text.is_learned, text.is_text) == ([USER, REPLY], [False, True], True)
    assert not RowFormat(chat=True).conversation_of({"prompt": "1+1?", "completion": "2"}).is_text
    for row, message in [
        ({"messages": [USER]}, "nothing to learn"),
        ({"prompt": "x"}, "none of the keys completion"),
        ({"prompt": "x", "completion": 3}, "got int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RowFormat().conversation_of(row)
