"""Reads preferences from a row: which of several completions of a prompt is the better one.

    pair         {"prompt": ..., "chosen": ..., "rejected": ...}            TRL, verl, UltraFeedback, HH-RLHF
                 with "margin": 0.5, or "tie": true, as needed
    ranking      {"prompt": ..., "responses": [...]}                        the best one first
                 with "ranks": [1, 3, 2, 1]                                 1 is the best, equal ones are ties
    scores       {"prompt": ..., "responses": [...], "scores": [7.5, ...]}  the highest is the best
    one label    {"prompt": ..., "completion": ..., "label": true}          KTO

Prompts and completions are texts or messages. Without a `prompt`, it is what `chosen` and `rejected` have in
common at their begin, as in TRL: messages, or characters (the space before the first different one belongs to
the completions). Completions of messages may contain the prompt's again. A response is a text, messages, or
one message. Null counts as missing, because parquet fills absent values with it.

All kinds become one: completions with levels, of which the higher one is better and equal ones are a tie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from typing import Any

from areal_like.data.row_format import (
    PROMPT_KEYS,
    ConversationRow,
    Message,
    checked_messages,
    conversation,
    first_of,
    tools_of,
    value_at,
)
from areal_like.errors import ConfigError

RESPONSES_KEYS = ("responses", "completions")
COMPLETION_KEYS = ("completion", "response")
_CHOSEN, _REJECTED = "chosen", "rejected"


@dataclass(frozen=True, kw_only=True)
class PreferenceRow:
    """One prompt with its completions."""

    prompt: str | list[Message]
    completions: list[str | list[Message]]
    """One with a label; otherwise two or more, all of them different."""
    levels: list[float]
    """For each completion: the higher one is better, and equal ones are a tie. With a label: 1 or 0."""
    margin: float = 0.0
    """By how much the score of the better one should be higher at least; of a pair only."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Function schemas of the row's column `tools`."""

    @property
    def label(self) -> bool | None:
        """True for a wanted completion, False for an unwanted one; None if the row compares completions."""
        return bool(self.levels[0]) if len(self.levels) == 1 else None

    @property
    def num_pairs(self) -> int:
        """Number of comparisons; 0 with a label."""
        return math.comb(len(self.levels), 2)

    @property
    def num_ties(self) -> int:
        """Comparisons without a better completion."""
        return sum(left == right for left, right in combinations(self.levels, 2))

    def conversation(self, at: int) -> ConversationRow:
        """The prompt with one completion, whose replies are learned; for `ConversationTokens`."""
        return conversation(self.prompt, self.completions[at], tools=self.tools)


@dataclass(frozen=True, kw_only=True)
class PreferenceFormat:
    """The keys of a row's parts. An empty key stands for the usual one."""

    prompt_key: str = ""
    chosen_key: str = ""
    rejected_key: str = ""
    system_prompt: str = ""
    """System message of prompts that have none."""
    chat: bool = False
    """True: a text prompt becomes a user message, and its completions the assistant's replies."""

    def read(self, row: Mapping[str, Any]) -> PreferenceRow:
        """Raises ConfigError for a row of another form."""
        chosen, rejected = self.chosen_key or _CHOSEN, self.rejected_key or _REJECTED
        if value_at(row, chosen) is not None or value_at(row, rejected) is not None:
            return self._pair(row, chosen, rejected)
        if found := first_of(row, RESPONSES_KEYS):
            return self._ranking(row, *found)
        if row.get("label") is not None and (found := first_of(row, COMPLETION_KEYS)):
            return self._labelled(row, *found)
        raise ConfigError(
            f"want `{chosen}` and `{rejected}`, `responses` (with `ranks` or `scores`), or `completion` with "
            f"`label`; the row has {', '.join(map(str, row)) or 'nothing'}"
        )

    def _pair(self, row: Mapping[str, Any], chosen: str, rejected: str) -> PreferenceRow:
        for key in (chosen, rejected):
            if value_at(row, key) is None:
                raise ConfigError(f"no `{key}`; the row has {', '.join(map(str, row))}")
        answers = [_answer(value_at(row, key), key=key) for key in (chosen, rejected)]
        tie, margin = row.get("tie") or False, row.get("margin")
        margin = 0.0 if margin is None else _number(margin, key="margin")
        if not isinstance(tie, bool):
            raise ConfigError(f"`tie`: want true or false, got {tie!r:.100}")
        if tie and margin:
            raise ConfigError(f"`margin` is {margin:g}, and a tie has none")
        levels = [0.0, 0.0] if tie else [1.0, 0.0]
        return self._row(row, answers, [chosen, rejected], levels, margin=margin)

    def _ranking(self, row: Mapping[str, Any], key: str, value: Any) -> PreferenceRow:
        if not isinstance(value, list) or len(value) < 2:
            raise ConfigError(f"`{key}`: want a list of two or more responses, got {value!r:.100}")
        names = [f"{key}[{at}]" for at in range(len(value))]
        answers = [_answer(item, key=name) for item, name in zip(value, names, strict=True)]
        levels = [-float(at) for at in range(len(value))]
        given = [name for name in ("ranks", "scores") if row.get(name) is not None]
        if len(given) == 2:
            raise ConfigError("`ranks` and `scores` both order the responses: leave one of them out")
        for name in given:
            numbers = row[name]
            if not isinstance(numbers, list) or len(numbers) != len(value):
                raise ConfigError(f"`{name}`: want {len(value)} numbers, one for each of `{key}`")
            sign = -1.0 if name == "ranks" else 1.0
            levels = [sign * _number(number, key=name) for number in numbers]
        return self._row(row, answers, names, levels)

    def _labelled(self, row: Mapping[str, Any], key: str, value: Any) -> PreferenceRow:
        label = row["label"]
        if not isinstance(label, bool) and label not in (0, 1):
            raise ConfigError(f"`label`: want true or false, got {label!r:.100}")
        return self._row(row, [_answer(value, key=key)], [key], [float(label)])

    def _row(
        self,
        row: Mapping[str, Any],
        answers: list[str | list[Message]],
        names: list[str],
        levels: list[float],
        *,
        margin: float = 0.0,
    ) -> PreferenceRow:
        """The row of these completions, which may still begin with the prompt. `names`: for errors."""
        for (left, first), (right, second) in combinations(zip(names, answers, strict=True), 2):
            if first == second:
                raise ConfigError(f"`{left}` and `{right}` are equal: there is nothing to prefer")
        key, prompt = self._given_prompt(row)
        if prompt == "" or prompt == []:
            prompt, answers = _split_prompt(answers, names)
        elif any(not isinstance(answer, str) and _has_prompt(answer) for answer in answers):
            given, (prompt, answers) = prompt, _split_prompt(answers, names)
            if not _is_in(given, prompt):
                raise ConfigError(f"`{names[0]}` begins with another prompt than `{key}`")
        for name, answer in zip(names, answers, strict=True):
            _check_reply(answer, key=name)
        if isinstance(prompt, str) and (self.system_prompt or self.chat):
            prompt = [{"role": "user", "content": prompt}] if prompt else []
        if self.system_prompt and isinstance(prompt, list) and [m["role"] for m in prompt[:1]] != ["system"]:
            prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        return PreferenceRow(
            prompt=prompt, completions=answers, levels=levels, margin=margin, tools=tools_of(row)
        )

    def _given_prompt(self, row: Mapping[str, Any]) -> tuple[str, str | list[Message]]:
        """(key, prompt), both empty if the row has none."""
        found = first_of(row, (self.prompt_key,) if self.prompt_key else PROMPT_KEYS[:-1])
        if found is None and self.prompt_key:
            raise ConfigError(f"no `{self.prompt_key}` (prompt_key); the row has {', '.join(map(str, row))}")
        key, value = found or ("", "")
        return key, value if isinstance(value, str) else checked_messages(value, key=key)


def _answer(value: Any, *, key: str) -> str | list[Message]:
    """A completion, perhaps with its prompt before it. Raises ConfigError for an empty one."""
    if isinstance(value, str):
        if not value.strip():
            raise ConfigError(f"`{key}` is empty")
        return value
    messages = checked_messages([value] if isinstance(value, Mapping) else value, key=key)
    _check_reply(messages, key=key)
    return messages


def _check_reply(answer: str | list[Message], *, key: str) -> None:
    if isinstance(answer, list) and not any(message["role"] == "assistant" for message in answer):
        raise ConfigError(f"`{key}` has no message of the assistant")


def _number(value: Any, *, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"`{key}`: want a number, got {value!r:.100}")
    return float(value)


def _has_prompt(answer: Sequence[Message]) -> bool:
    return answer[0]["role"] in ("system", "developer", "user")


def _is_in(given: str | list[Message], found: str | list[Message]) -> bool:
    """True if the prompt of a column is that at the begin of the completions."""
    if isinstance(given, list):
        return isinstance(found, list) and found[-len(given) :] == given
    return any(message["content"] == given for message in found if isinstance(message, Mapping))


def _split_prompt(
    answers: list[str | list[Message]], names: list[str]
) -> tuple[str | list[Message], list[str | list[Message]]]:
    """(what the answers have in common at their begin, the rest of each), as TRL's `extract_prompt`."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    if texts and len(texts) < len(answers):
        raise ConfigError(f"`{names[0]}` and `{names[-1]}`: one is a text, the other one messages")
    if len(answers) == 1:  # a label: all but the last reply
        (answer,) = answers
        return ("", answers) if isinstance(answer, str) else (answer[:-1], [answer[-1:]])
    columns = takewhile(lambda items: all(item == items[0] for item in items), zip(*answers, strict=False))
    num_common = sum(1 for _ in columns)
    if texts and num_common > 0 and texts[0][num_common - 1] == " ":
        num_common -= 1
    rests = [answer[num_common:] for answer in answers]
    for name, rest in zip(names, rests, strict=True):
        if not rest:
            raise ConfigError(f"`{name}` is the beginning of another one: give the `prompt` of the row")
    return answers[0][:num_common], rests
