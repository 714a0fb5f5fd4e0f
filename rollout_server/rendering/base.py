"""The interface between conversations and a model's chat format.

A renderer turns messages into the token ids of a prompt and sampled token ids into a reply. It never converts
a sampled reply back into token ids to train on: `bridge` returns the tokens that follow a sampled turn, and a
conversation appends them to the tokens that the engine sampled.

Your own chat format, configured as `model.renderer=my_module.MyRenderer`, is a subclass of `ChatRenderer`,
or of `JinjaRenderer` (rendering/jinja.py) if only its tool calls differ from the usual ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.environments.base import Message, ToolCall

ToolSchema = Mapping[str, Any]
"""A tool as an OpenAI function schema: `{"type": "function", "function": {...}}`."""


@dataclass(frozen=True, kw_only=True)
class ParsedReply:
    """The parts of the policy's reply in one turn."""

    text: str
    """Text without special tokens, reasoning and tool calls."""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """Includes malformed calls, with their raw text as `arguments` and an empty name if none could be read.
    The conversation assigns an id to calls without one."""


class ChatRenderer(ABC):
    """The chat format of one model. Methods that take messages raise EpisodeError if they cannot be rendered,
    and do not modify their arguments."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        """`tokenizer`: a transformers tokenizer. `stop_token_ids`: those named by the tokenizer and the
        model's generation_config.json. `template_kwargs`: `model.chat_template_kwargs`. Raises ConfigError if
        the format does not fit the tokenizer."""
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        """Ids that end a turn; the sampled one is the turn's last token."""
        self.vocab_size = vocab_size
        """Upper bound (exclusive) of token ids in a prompt."""
        self.template_kwargs = dict(template_kwargs)

    @property
    @abstractmethod
    def supports_tools(self) -> bool:
        """False if the format cannot include the schemas of tools."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the token ids of a whole conversation; with `add_generation_prompt`, up to the policy's
        next token."""

    def num_tokens(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        """Returns the lengths of many prompts as rendered by `render`."""
        return [len(self.render(messages)) for messages in conversations]

    @abstractmethod
    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
    ) -> list[int] | None:
        """Returns the tokens after a sampled turn: its end if it was cut off, the new messages, the
        generation prompt.

        `prompt_ids` and `completion_ids`: the tokens before the turn and of the turn, as the engine saw and
        sampled them. `messages`: the conversation up to and including the turn, which is the last message.
        Returns None if the new messages would change how the earlier ones are rendered (for example because
        earlier reasoning is stripped), or if new messages cannot be appended.
        """

    @abstractmethod
    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        """Parses sampled tokens into a reply; any tokens are accepted."""

    def parse_text(self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int]) -> ParsedReply:
        """Parses the reply without tool calls: anything that looks like one stays in the text as the policy
        wrote it."""
        parsed = self.parse(completion_ids, prompt_ids=prompt_ids)
        if not parsed.tool_calls:
            return parsed
        text = self.decode(completion_ids, skip_special_tokens=True)
        if parsed.reasoning and parsed.reasoning in text:
            after = text.partition(parsed.reasoning)[2]
            text = after.lstrip().removeprefix("</think>").lstrip("\n")
        return ParsedReply(text=text, reasoning=parsed.reasoning)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
