"""Renders with the tokenizer's chat template, for models without a renderer of their own.

A template renders whole conversations, so `bridge` finds what follows a sampled turn by comparing three
texts: the prompt of the turn, the conversation up to the turn, and the conversation with the new messages. If
each is a prefix of the next, the template only appends here, and the text after the turn's end-of-turn token
is tokenized and appended to the sampled tokens. Otherwise the template changes earlier text (it strips
earlier reasoning, ...), and the conversation has to start a new segment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from areal_like.chat.messages import with_parsed_arguments
from areal_like.errors import ConfigError, EpisodeError
from rollout_server.environments.base import Message, ToolCall
from rollout_server.rendering.base import ChatRenderer, ParsedReply, ToolSchema

_REASONING = "reasoning_content"
_PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"value": {"type": "integer", "description": "A number."}},
            "required": ["value"],
        },
    },
}
_PROBE_REPLY = "ProbeReply"
_PROBE_REASONING = "ProbeReasoning"
_MAX_ERROR_CHARS = 300
_TOKENS_OF_A_MARKER = 16
"""Maximum number of tokens in the marker that starts the reasoning, including the white space after it."""
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')
ParseCall = Callable[[str], tuple[str, str]]
"""Parses the text between a call's markers into name and arguments."""


@dataclass(frozen=True, kw_only=True)
class Markers:
    """The markers around the parts of a reply."""

    reasoning_begin: str = "<think>"
    reasoning_end: str = "</think>"
    call_begin: str = "<tool_call>"
    call_end: str = "</tool_call>"

    @property
    def all(self) -> tuple[str, ...]:
        return self.reasoning_begin, self.reasoning_end, self.call_begin, self.call_end


class JinjaRenderer(ChatRenderer):
    """Any model whose tokenizer has a chat template."""

    markers: ClassVar[Markers] = Markers()
    """Markers around reasoning and tool calls in a reply."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "model.path: the tokenizer has no chat template, which conversations need: add "
                "chat_template.jinja to the model's directory, or set model.renderer"
            )
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        # In many base models the template ends a turn with another token than the model's files name. Without
        # that token the policy would continue after the end of its turn.
        closing_ids = self._encode(self._closing)[:1]
        self.stop_token_ids = tuple(sorted({*self.stop_token_ids, *(i for i in closing_ids if i in special)}))
        self._stop_texts = {i: self.decode([i]) for i in self.stop_token_ids}
        self._ends_turns = any(text in self._closing for text in self._stop_texts.values())
        # If the last message is a reply, Phi-3's template writes an EOS after the reply's own end token.
        eos = self.tokenizer.eos_token or ""
        own_closing = self._closing.removesuffix(eos)
        has_own_end = any(text in own_closing for text in self._stop_texts.values())
        self._end_of_list = eos if self._closing.endswith(eos) and has_own_end else ""
        marker_ids = {i for i in special if self.decode([i]) in self.markers.all}
        self._hidden_ids = (special - marker_ids) | set(self.stop_token_ids)

    def parse_call(self, body: str) -> tuple[str, str]:
        """Parses the text between a tool call's markers; returns name and arguments (a JSON object as text).

        Override it for another format. For a malformed call, return the body as arguments and the name if
        it can be read, else an empty name.
        """
        return parse_json_call(body)

    @cached_property
    def supports_tools(self) -> bool:
        """True if the template renders the schemas of tools."""
        messages: list[Message] = [{"role": "user", "content": "hello"}]
        try:
            return self._text(messages, (_PROBE_TOOL,)) != self._text(messages, ())
        except EpisodeError:  # the first prompt will fail with the template's own message
            return True

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        return self._encode(self._text(messages, tools, add_generation_prompt))

    def num_tokens(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        # A single call of the tokenizer is much faster.
        texts = [self._text(messages, (), True) for messages in conversations]
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
    ) -> list[int] | None:
        if not self._ends_turns or not completion_ids:
            return None
        try:
            prompt = self._text(messages[:-1], tools, True)
            until_turn = self._text(messages, tools, False)
            whole = self._text([*messages, *new_messages], tools, True)
        except EpisodeError:  # rendering everything may work, or gives the reason
            return None
        if not whole.startswith(until_turn):
            until_turn = until_turn.removesuffix(self._end_of_list)
        if not (until_turn.startswith(prompt) and whole.startswith(until_turn)):
            return None
        turn = until_turn[len(prompt) :]
        reasoning = str(messages[-1].get(_REASONING) or "").strip()
        if reasoning not in turn:  # the template strips the reasoning from every turn
            return None
        end = max(turn.rfind(text) for text in self._stop_texts.values())
        if end < 0:
            return None
        # A token may include adjacent white space, so the end-of-turn token is tokenized with the text after
        # it.
        first, *rest = self._encode(turn[end:] + whole[len(until_turn) :])
        if first not in self._stop_texts:
            return None
        return rest if completion_ids[-1] in self._stop_texts else [first, *rest]

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        return self._split(completion_ids, prompt_ids, parse_call=self.parse_call)

    def parse_text(self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int]) -> ParsedReply:
        return self._split(completion_ids, prompt_ids, parse_call=None)

    def _split(
        self, completion_ids: Sequence[int], prompt_ids: Sequence[int], *, parse_call: ParseCall | None
    ) -> ParsedReply:
        before = self.decode(list(prompt_ids)[-_TOKENS_OF_A_MARKER:]).rstrip()
        return split_reply(
            self.decode([i for i in completion_ids if i not in self._hidden_ids]),
            markers=self.markers,
            parse_call=parse_call,
            starts_in_reasoning=before.endswith(self.markers.reasoning_begin),
        )

    @cached_property
    def _closing(self) -> str:
        """Returns what the template writes after the text of a reply; empty if that cannot be determined."""
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE_REPLY}]
        try:
            return self._text(messages, (), False).partition(_PROBE_REPLY)[2]
        except EpisodeError:
            return ""

    @cached_property
    def _knows_reasoning(self) -> bool:
        """True if the template renders the reasoning of a reply; probed with the last reply of a list."""
        reply = {"role": "assistant", "content": _PROBE_REPLY, _REASONING: _PROBE_REASONING}
        try:
            return _PROBE_REASONING in self._rendered(
                [{"role": "user", "content": "hello"}, reply], (), False
            )
        except EpisodeError:
            return True

    def _with_reasoning(self, message: Message) -> Message:
        """Returns the message with its reasoning as part of its text, for a template that would drop the
        reasoning.

        So a policy that reasons although its template does not support reasoning (many base models) sees it
        in its earlier replies.
        """
        if not message.get(_REASONING) or self._knows_reasoning:
            return message
        begin, end = self.markers.reasoning_begin, self.markers.reasoning_end
        text = f"{begin}\n{message[_REASONING]}\n{end}\n\n{message['content']}"
        return {key: value for key, value in message.items() if key != _REASONING} | {"content": text}

    def _encode(self, text: str) -> list[int]:
        # The template contains the special tokens; adding them again would duplicate the BOS.
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        add_generation_prompt: bool = True,
    ) -> str:
        return self._rendered(
            [self._with_reasoning(message) for message in messages], tools, add_generation_prompt
        )

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], add_generation_prompt: bool
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [with_parsed_arguments(message) for message in messages],
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.template_kwargs,
                )
            )
        except Exception as error:  # a template may raise anything
            raise EpisodeError(
                f"the chat template cannot render these messages ({type(error).__name__}: "
                f"{str(error)[:_MAX_ERROR_CHARS]})"
            ) from error


def parse_json_call(body: str) -> tuple[str, str]:
    """Parses a call as Hermes and Qwen write it, `{"name": "add", "arguments": {"a": 1}}`; returns the name,
    and the arguments as JSON text.

    For any other body, returns the name if it can be read, else an empty one, and the body as arguments.
    """
    try:
        call = json.loads(body)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found = _NAME.search(body)
        return found.group(1) if found else "", body
    if not isinstance(name, str):
        return "", body
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def split_reply(
    text: str,
    *,
    markers: Markers,
    parse_call: ParseCall | None = parse_json_call,
    starts_in_reasoning: bool = False,
) -> ParsedReply:
    """Splits a reply, given without its end-of-turn token, into reasoning, text and tool calls.

        [<think> reasoning </think>] text [<tool_call> body </tool_call> text]*

    No text raises an exception: a malformed call keeps its raw text, so that an environment can tell the
    policy what is wrong with it.

    `parse_call`: None leaves calls in the text. `starts_in_reasoning`: the prompt ended with the marker that
    starts the reasoning. If the reasoning does not end, the text is empty; a call that does not end is
    malformed.
    """
    reasoning = ""
    begin = text.lstrip()
    if starts_in_reasoning or begin.startswith(markers.reasoning_begin):
        inside = begin.removeprefix(markers.reasoning_begin)
        reasoning, _, text = inside.partition(markers.reasoning_end)
        reasoning, text = reasoning.strip("\n"), text.lstrip("\n")
    if parse_call is None:
        return ParsedReply(text=text, reasoning=reasoning)
    text, *rest = text.split(markers.call_begin)
    calls = []
    for part in rest:
        body, end, after = part.partition(markers.call_end)
        name, arguments = parse_call(body.strip()) if end else ("", body)
        calls.append(ToolCall(id="", name=name, arguments=arguments))
        text += after
    return ParsedReply(text=text.strip() if calls else text, reasoning=reasoning, tool_calls=tuple(calls))
