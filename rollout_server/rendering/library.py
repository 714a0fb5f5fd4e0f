"""Renderers from the package `renderers`, each written for one family of models.

They know where a turn of their model ends and which reasoning it keeps, so their bridge does not have to
compare texts, and they parse the model's own format of tool calls. Whether one fits a tokenizer is tested by
rendering: its token ids must equal those of the tokenizer's chat template.

The package takes a second to import, so this module is imported only where it is used.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from renderers import create_renderer
from renderers.base import MODEL_RENDERER_MAP
from renderers.configs import config_from_name

from areal_like.chat.messages import with_parsed_arguments
from areal_like.errors import ConfigError, EpisodeError, first_line
from rollout_server.environments.base import Message, ToolCall
from rollout_server.rendering.base import ChatRenderer, ParsedReply, ToolSchema
from rollout_server.rendering.jinja import JinjaRenderer

log = logging.getLogger(__name__)

_NEED_NAMES = ("gemma4", "gpt-oss")
"""Renderers that need the tool's name in its result; the chat templates take it from the call."""
_EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")
_CHARS_BEFORE = 20
_CHARS_OF_DIFFERENCE = 100
"""Number of characters of two renderings shown in an error, starting `_CHARS_BEFORE` before the first
difference."""
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
_USER: Message = {"role": "user", "content": "What is 3 + 4?"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00000",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'},
        }
    ],
}
_PROBES: tuple[tuple[list[Message], tuple[ToolSchema, ...]], ...] = (
    ([_USER], ()),
    ([{"role": "system", "content": "Be brief."}, _USER], (_TOOL,)),
    ([_USER, {"role": "assistant", "content": "It is 7."}, {"role": "user", "content": "And + 1?"}], ()),
    ([_USER, _CALL, {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "7"}], (_TOOL,)),
)


def find_renderer(
    tokenizer: Any, *, model: str, candidates: Sequence[str], **options: Any
) -> LibraryRenderer | None:
    """Returns a renderer that agrees with the model's chat template, or None.

    `model`: its directory or name; `candidates`: renderers that may fit, tried in this order after the one
    for the name; `options`: those of ChatRenderer.
    """
    by_name = [MODEL_RENDERER_MAP[model]] if model in MODEL_RENDERER_MAP else []
    for name in dict.fromkeys([*by_name, *candidates]):
        found = _fitting(name, tokenizer, **options)
        if isinstance(found, LibraryRenderer):
            return found
        log.debug("renderer %s: %s", name, found)
    return None


def named_renderer(name: str, tokenizer: Any, **options: Any) -> LibraryRenderer:
    """Returns the renderer with this name. Raises ConfigError if it is unknown or disagrees with the chat
    template."""
    if not config_is_known(name):
        raise ConfigError(
            f"model.renderer={name}: choose one of auto, jinja, "
            f"{', '.join(sorted(set(MODEL_RENDERER_MAP.values())))}, and module.Class for your own"
        )
    found = _fitting(name, tokenizer, **options)
    if isinstance(found, str):
        raise ConfigError(
            f"model.renderer={name}: {found}. Use another renderer, or jinja for the chat template"
        )
    return found


def _fitting(name: str, tokenizer: Any, **options: Any) -> LibraryRenderer | str:
    """Returns the renderer, or why it does not fit the tokenizer."""
    try:
        renderer = LibraryRenderer(tokenizer, name=name, **options)
    # A renderer asserts that the tokenizer has its special tokens, and refuses unknown template_kwargs.
    except (ValueError, AssertionError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be used with this tokenizer and model.chat_template_kwargs ({first_line(error)})"
    return (renderer.difference() if tokenizer.chat_template else "") or renderer


def config_is_known(name: str) -> bool:
    """True if the package has a renderer of this name, for one family of models."""
    try:
        return name not in ("auto", "default", "custom") and config_from_name(name) is not None
    except ValueError:
        return False


class LibraryRenderer(ChatRenderer):
    """Wraps a renderer of the package."""

    def __init__(self, tokenizer: Any, *, name: str, **options: Any) -> None:
        """`name`: the renderer's name in the package. Raises the package's exceptions if it does not fit the
        tokenizer."""
        super().__init__(tokenizer, **options)
        self.name = name
        """Name of the renderer in the package."""
        self._renderer: Any = create_renderer(
            tokenizer, config_from_name(name), chat_template_kwargs=self.template_kwargs
        )
        own_ids = self._renderer.get_stop_token_ids()
        self.stop_token_ids = tuple(sorted({*self.stop_token_ids, *own_ids}))

    @cached_property
    def supports_tools(self) -> bool:
        try:
            return self.render([_USER], tools=(_TOOL,)) != self.render([_USER])
        except EpisodeError:
            return False

    def difference(self) -> str:
        """Describes how its prompts differ from those of the tokenizer's chat template; empty if they do not.

        Empty reasoning is ignored: with enable_thinking=false some templates strip it from earlier turns,
        where it was sampled, and the package keeps it.
        """
        # A renderer uses a fixed date; the template would use today's if none is given.
        date = getattr(self._renderer.config, "date_string", None)
        kwargs = ({"date_string": date} if date else {}) | self.template_kwargs
        template = JinjaRenderer(
            self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            vocab_size=self.vocab_size,
            template_kwargs=kwargs,
        )
        for ours, theirs in self._probes(template):
            texts = [_EMPTY_REASONING.sub("", self.decode(ids)) for ids in (ours, theirs)]
            if ours != theirs and texts[0] != texts[1]:
                pairs = enumerate(zip(*texts, strict=False))
                first = next((i for i, (left, right) in pairs if left != right), min(map(len, texts)))
                first = max(0, first - _CHARS_BEFORE)
                ours_text, theirs_text = (text[first : first + _CHARS_OF_DIFFERENCE] for text in texts)
                return (
                    f"where it renders ...{ours_text!r}..., the tokenizer's chat template renders "
                    f"...{theirs_text!r}..."
                )
        return ""

    def _probes(self, template: JinjaRenderer) -> Iterator[tuple[list[int], list[int]]]:
        for messages, tools in _PROBES:
            if tools and not template.supports_tools:
                continue
            try:
                theirs = template.render(messages, tools=tools)
            except EpisodeError:  # the template does not support this conversation
                continue
            try:
                yield self.render(messages, tools=tools), theirs
            except EpisodeError:
                yield [], theirs

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        try:
            return list(
                self._renderer.render_ids(
                    self._prepared(messages),
                    tools=_copies(tools),
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except Exception as error:  # like a chat template, it may raise anything
            raise EpisodeError(
                f"the renderer {self.name} cannot render these messages ({first_line(error)})"
            ) from error

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
    ) -> list[int] | None:
        before = [*prompt_ids, *completion_ids]
        try:
            extended = self._renderer.bridge_to_next_turn(
                list(prompt_ids),
                list(completion_ids),
                self._prepared([*messages, *new_messages])[len(messages) :],
                tools=_copies(tools),
            )
        except Exception:  # it may still be able to render the conversation
            log.debug("renderer %s: no bridge", self.name, exc_info=True)
            return None
        if extended is None or list(extended.token_ids[: len(before)]) != before:
            return None
        return list(extended.token_ids[len(before) :])

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        try:
            parsed = self._renderer.parse_response(
                list(completion_ids), tools=_copies(tools), prompt_ids=list(prompt_ids)
            )
        except Exception:  # a policy may write anything
            log.debug("renderer %s: a reply cannot be parsed", self.name, exc_info=True)
            return ParsedReply(text=self.decode(completion_ids, skip_special_tokens=True))
        return ParsedReply(
            text=parsed.content or "",
            reasoning=parsed.reasoning_content or "",
            tool_calls=tuple(_tool_call(call) for call in parsed.tool_calls),
        )

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        prepared = [with_parsed_arguments(message) for message in messages]
        if self.name not in _NEED_NAMES:
            return prepared
        names: dict[Any, str] = {}
        for message in messages:
            names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", [])}
        return [
            {"name": names.get(message.get("tool_call_id"), "unknown"), **message}
            if message["role"] == "tool"
            else message
            for message in prepared
        ]


def _copies(tools: Sequence[ToolSchema]) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] or None


def _tool_call(call: Any) -> ToolCall:
    """Converts a call; if its arguments are not a JSON object, they become the raw text."""
    name = call.name if isinstance(call.name, str) else ""
    if name and isinstance(call.arguments, dict):
        arguments = json.dumps(call.arguments, ensure_ascii=False)
    else:
        arguments = call.raw
    return ToolCall(id=call.id or "", name=name, arguments=arguments)
