"""Reads prompt, reference answer, label and conversation from a row, in the common formats.

    verl         {"data_source": ..., "prompt": [messages], "reward_model": {"ground_truth": ...}, ...}
    TRL          {"prompt": text or messages, ...}, {"prompt": ..., "completion": ...}, {"messages": [...]}
    plain        {"question": ..., "answer": ...}

A key that is not configured is the first of the usual names that the row has. Dots lead into objects:
`reward_model.ground_truth`. Null counts as missing, because parquet fills absent values with it.

A prompt that is a text stays a text, as in TRL, unless there is a system prompt or `chat`; messages stay
messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError

Message = dict[str, Any]
"""A chat message in OpenAI's format: `role`, `content`, and `tool_calls` or `tool_call_id` where needed."""

PROMPT_KEYS = ("prompt", "question", "problem", "messages")
ANSWER_KEYS = ("reward_model.ground_truth", "answer", "ground_truth", "solution")
MESSAGES_KEYS = ("messages",)
COMPLETION_KEYS = ("completion", "response")
LABEL_KEYS = ("data_source",)
MAX_LABEL_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class ConversationRow:
    """A row for supervised training."""

    messages: list[Message]
    is_learned: list[bool]
    """For each message: True if its tokens are targets."""
    is_text: bool = False
    """True: prompt and completion are texts to be joined as they are, without a chat template."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Function schemas of the row's column `tools`."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """The keys of a row's parts. An empty key stands for the first usual key that a row has."""

    prompt_key: str = ""
    answer_key: str = ""
    messages_key: str = ""
    completion_key: str = ""
    label_key: str = ""
    system_prompt: str = ""
    """System message of prompts and conversations that have none."""
    chat: bool = False
    """True: a text prompt becomes a user message."""

    def prompt_of(self, row: Mapping[str, Any]) -> str | list[Message]:
        """The prompt: a text, or messages. For a whole conversation: the messages before the last reply.

        Raises ConfigError.
        """
        key, value = _wanted(row, self.prompt_key, PROMPT_KEYS, setting="prompt_key")
        if isinstance(value, str):
            if not value.strip():
                raise ConfigError(f"`{key}` is empty")
            if not (self.system_prompt or self.chat):
                return value
            return self._with_system([{"role": "user", "content": value}])
        messages = checked_messages(value, key=key)
        while key in MESSAGES_KEYS and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ConfigError(f"`{key}` has no message before the assistant's")
        return self._with_system(messages)

    def answer_of(self, row: Mapping[str, Any]) -> Any:
        """The reference answer; None if no key is configured and the row has none of the usual ones.

        For a conversation without a separate answer it is the content of the last reply. Raises ConfigError
        if a configured key is missing.
        """
        if self.answer_key:
            return _wanted(row, self.answer_key, (), setting="answer_key")[1]
        found = first_of(row, ANSWER_KEYS)
        if found is None and first_of(row, _keys(self.prompt_key, PROMPT_KEYS[:-1])) is None:
            whole = first_of(row, MESSAGES_KEYS)
            messages = checked_messages(whole[1], key=whole[0]) if whole else []
            return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
        return None if found is None else found[1]

    def label_of(self, row: Mapping[str, Any]) -> str:
        """The label of metrics: at most 64 printable characters; empty if there is none.

        Raises ConfigError if a configured key is missing, or for a value that is not a label.
        """
        if self.label_key:
            key, value = _wanted(row, self.label_key, (), setting="label_key")
        else:
            key, value = first_of(row, LABEL_KEYS) or ("", "")
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or len(value) > MAX_LABEL_CHARS or not value.isprintable():
            raise ConfigError(
                f"`{key}`: want up to {MAX_LABEL_CHARS} printable characters, got {value!r:.100}"
            )
        return value

    def conversation_of(self, row: Mapping[str, Any]) -> ConversationRow:
        """The row as a conversation. In `messages` every reply is learned, in a prompt with completion only
        the completion. Raises ConfigError."""
        tools = tools_of(row)
        found = None if self.completion_key else first_of(row, _keys(self.messages_key, MESSAGES_KEYS))
        if found is not None:
            messages = self._with_system(checked_messages(found[1], key=found[0]))
            is_learned = [message["role"] == "assistant" for message in messages]
            if not any(is_learned):
                raise ConfigError(f"`{found[0]}` has no assistant message: there is nothing to learn")
            return ConversationRow(messages=messages, is_learned=is_learned, tools=tools)
        if self.messages_key:
            _wanted(row, self.messages_key, (), setting="messages_key")
        completion_keys = (*COMPLETION_KEYS, "answer", "solution")
        key, value = _wanted(row, self.completion_key, completion_keys, setting="completion_key")
        completion = value if isinstance(value, str) else checked_messages(value, key=key)
        made = conversation(self.prompt_of(row), completion, tools=tools)
        if not any(made.is_learned):
            raise ConfigError(f"`{key}` has no assistant message: there is nothing to learn")
        return made

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if not self.system_prompt or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def conversation(
    prompt: str | list[Message], completion: str | list[Message], *, tools: list[dict[str, Any]] | None = None
) -> ConversationRow:
    """A prompt with its completion, of which the replies are learned."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return ConversationRow(
        messages=before + after,
        is_learned=[False] * len(before) + [message["role"] == "assistant" for message in after],
        is_text=isinstance(prompt, str) and isinstance(completion, str),
        tools=tools or [],
    )


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The function schemas of a row's column `tools`, a list or its JSON text. Raises ConfigError."""
    tools = row.get("tools") or []
    if isinstance(tools, str):  # as in some of TRL's data sets
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"`tools`: not JSON ({error})") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"`tools`: want a list of function schemas, got {type(tools).__name__}")
    return tools


def value_at(row: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of a path with dots; None if it is missing."""
    if key in row:
        return row[key]
    value: Any = row
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _keys(configured: str, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (configured,) if configured else usual


def first_of(row: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of the keys that the row has, with its value."""
    for key in keys:
        if (value := value_at(row, key)) is not None:
            return key, value
    return None


def _wanted(
    row: Mapping[str, Any], configured: str, usual: tuple[str, ...], *, setting: str
) -> tuple[str, Any]:
    found = first_of(row, _keys(configured, usual))
    if found is None:
        has = f"the row has {', '.join(map(str, row)) or 'nothing'}"
        if configured:
            raise ConfigError(f"no `{configured}` ({setting}); {has}")
        raise ConfigError(f"none of the keys {', '.join(usual)}: set {setting}; {has}")
    return found


def checked_messages(value: Any, *, key: str) -> list[Message]:
    """The checked messages of `value` without keys whose value is null: parquet fills absent keys with it."""
    if not isinstance(value, list) or not value:
        got = "list without items" if value == [] else type(value).__name__
        raise ConfigError(f"`{key}`: want a text or a list of messages, got {got}")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"`{key}`: each message needs `role` and `content`, got {message!r:.100}")
        filled = {name: item for name, item in message.items() if item is not None}
        content = filled.setdefault("content", "")
        if isinstance(content, list) and all(_is_text_part(part) for part in content):
            content = filled["content"] = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ConfigError(f"`{key}`: the content of a message must be text, got {content!r:.100}")
        if not content and filled["role"] != "system" and not filled.get("tool_calls"):
            raise ConfigError(f"`{key}`: a message of {filled['role']} has no content")
        messages.append(filled)
    return messages


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
