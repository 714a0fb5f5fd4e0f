"""Preferences of the usual rows, unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from areal_like.data.preference_format import PreferenceFormat, PreferenceRow
from areal_like.errors import ConfigError

SYSTEM, USER = {"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}
RIGHT, WRONG = {"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}


def read(row: dict[str, Any], **settings: Any) -> PreferenceRow:
    return PreferenceFormat(**settings).read(row)


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ["2", "3"]),  # verl's full_hh_rlhf
        ({"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}, [USER], [[RIGHT], [WRONG]]),
        ({"prompt": [USER], "chosen": RIGHT, "rejected": WRONG}, [USER], [[RIGHT], [WRONG]]),
        # Without a prompt; UltraFeedback has it three times, as a text and in both completions.
        ({"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, [USER], [[RIGHT], [WRONG]]),
        (
            {"prompt": "1+1?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG], "score_chosen": 8.0},
            [USER],
            [[RIGHT], [WRONG]],
        ),
        (
            {"prompt": [USER], "chosen": [SYSTEM, USER, RIGHT], "rejected": [SYSTEM, USER, WRONG]},
            [SYSTEM, USER],
            [[RIGHT], [WRONG]],
        ),
        ({"chosen": "1+1 is 2", "rejected": "1+1 is 3", "margin": None}, "1+1 is", [" 2", " 3"]),
        ({"chosen": "yes", "rejected": "no"}, "", ["yes", "no"]),
        ({"prompt": "1+1=", "responses": ["2", "1.9", "3"]}, "1+1=", ["2", "1.9", "3"]),
        ({"prompt": [USER], "completions": [RIGHT, "3"]}, [USER], [[RIGHT], "3"]),
        ({"prompt": "1+1=", "completion": "2", "label": True}, "1+1=", ["2"]),
        ({"completion": [USER, RIGHT], "label": False}, [USER], [[RIGHT]]),
    ],
)
def test_usual_rows_need_no_keys(row: dict[str, Any], prompt: Any, completions: list[Any]) -> None:
    found = read(row)
    assert (found.prompt, found.completions) == (prompt, completions)
    assert found.levels == sorted(found.levels, reverse=True)
    assert (found.label is None) == ("label" not in row) and found.num_ties == 0


@pytest.mark.parametrize(
    ("row", "levels", "num_ties"),
    [
        ({"chosen": "a", "rejected": "b", "tie": True}, [0, 0], 1),
        ({"chosen": "a", "rejected": "b", "tie": False}, [1, 0], 0),
        ({"responses": ["a", "b", "c"]}, [0, -1, -2], 0),
        ({"responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, [-2, -1, -2], 1),
        ({"responses": ["a", "b", "c"], "scores": [0.5, 0.5, 0.5]}, [0.5, 0.5, 0.5], 3),
    ],
)
def test_ranks_and_ties(row: dict[str, Any], levels: list[float], num_ties: int) -> None:
    found = read(row | {"prompt": "x"})
    assert found.levels == levels and found.num_ties == num_ties
    assert found.num_pairs == len(levels) * (len(levels) - 1) / 2


def test_configured_keys_and_prompts() -> None:
    row = {"question": {"text": "1+1?"}, "good": "2", "bad": "3", "margin": 0.5, "tools": [{"type": "x"}]}
    keys = {"prompt_key": "question.text", "chosen_key": "good", "rejected_key": "bad"}
    found = read(row, **keys)
    assert (found.prompt, found.margin, found.tools) == ("1+1?", 0.5, [{"type": "x"}])
    assert found.conversation(1).is_text and found.conversation(1).tools == found.tools
    assert read({**row, "tools": '[{"type": "x"}]'}, **keys).tools == found.tools
    chat = read(row, system_prompt="Be short.", **keys)
    assert chat.prompt == [SYSTEM, USER]
    assert chat.conversation(0).messages == [SYSTEM, USER, RIGHT]
    assert chat.conversation(0).is_learned == [False, False, True]
    own = read({"chosen": [SYSTEM, USER, RIGHT], "rejected": [SYSTEM, USER, WRONG]}, system_prompt="x")
    assert own.prompt == [SYSTEM, USER]
    assert read({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, chat=True).prompt == [USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, r"want `chosen` and `rejected`, .*; the row has prompt"),
        ({"prompt": "x", "chosen": "a"}, "no `rejected`; the row has prompt, chosen"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "`chosen` and `rejected` are equal"),
        ({"prompt": "x", "chosen": "a", "rejected": " \n"}, "`rejected` is empty"),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "want a text or a list of messages, got int"),
        ({"prompt": "x", "chosen": "a", "rejected": []}, "list without items"),
        (
            {"prompt": [USER], "chosen": [RIGHT], "rejected": [USER]},
            "`rejected` has no message of",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tie": 1}, "`tie`: want true or false, got 1"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tie": True, "margin": 1}, "a tie has none"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "1"}, "`margin`: want a number, got '1'"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": float("nan")}, "want a number, got nan"),
        ({"prompt": "y", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, "another prompt than `prompt`"),
        ({"chosen": [USER, RIGHT], "rejected": "b"}, "one is a text, the other one messages"),
        ({"chosen": "a", "rejected": "ab"}, "`chosen` is the beginning of another one: give the `prompt`"),
        ({"prompt": "x", "responses": ["a"]}, "want a list of two or more"),
        ({"prompt": "x", "responses": ["a", "b", "a"]}, r"`responses\[0\]` and `responses\[2\]` are equal"),
        ({"prompt": "x", "responses": ["a", "b"], "ranks": [1]}, "`ranks`: want 2 numbers"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, True]}, "`scores`: want a number, got True"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "leave one of them"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tools": "[{"}, "`tools`: not JSON"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tools": "{}"}, "`tools`: want a list of function"),
        ({"prompt": "x", "completion": "a", "label": "good"}, "`label`: want true or false, got 'good'"),
    ],
)
def test_another_shape_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(row)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no `q` \(prompt_key\); the row has chosen, rejected"):
        read({"chosen": "a", "rejected": "b"}, prompt_key="q")
