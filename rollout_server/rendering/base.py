"""The interface between conversations and a model's chat format.

A renderer turns messages into the token ids of a prompt and sampled token ids into a reply. It never turns a
sampled reply back into token ids that are trained on: `bridge` gives the tokens that follow a sampled turn,
and a conversation appends them to the tokens that the engine sampled.

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
    """What the policy said in one turn."""

    text: str
    """Without special tokens, reasoning and tool calls."""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    """A malformed call is among them, with its raw text as `arguments`, and without a name if none could be
    read. A call without an id gets one from the conversation."""


class ChatRenderer(ABC):
    """The chat format of one model. Methods that get messages raise EpisodeError if they cannot be rendered;
    they change none of their arguments."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        """`tokenizer`: of transformers. `stop_token_ids`: those that the tokenizer and the model's
        generation_config.json name. `template_kwargs`: `model.chat_template_kwargs`. Raises ConfigError if
        the format does not fit the tokenizer."""
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        """Ids that end a turn; the one that was sampled is the turn's last token."""
        self.vocab_size = vocab_size
        """Every token id of a prompt must be below it."""
        self.template_kwargs = dict(template_kwargs)

    @property
    @abstractmethod
    def supports_tools(self) -> bool:
        """False if the format has no place for the schemas of tools."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a whole conversation; with `add_generation_prompt`, up to the policy's next token."""

    def num_tokens(self, conversations: Sequence[Sequence[Message]]) -> list[int]:
        """Lengths of many prompts, as `render` would have them."""
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
        """Tokens that follow a sampled turn: its end if it was cut, the new messages, the generation prompt.

        `prompt_ids` and `completion_ids`: the tokens up to and of the turn, as the engine saw and sampled
        them. `messages`: the conversation up to and with the turn, which is the last message. None if the
        format would render the earlier messages in another way after the new ones (it strips earlier
        reasoning, ...), or if new messages cannot be appended.
        """

    @abstractmethod
    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        """The reply in sampled tokens, whatever they are."""

    def parse_text(self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int]) -> ParsedReply:
        """The reply without tool calls: what looks like one is left in the text as the policy wrote it."""
        parsed = self.parse(completion_ids, prompt_ids=prompt_ids)
        if not parsed.tool_calls:
            return parsed
        text = self.decode(completion_ids, skip_special_tokens=True)
        if parsed.reasoning and parsed.reasoning in text:
            after = text.partition(parsed.reasoning)[2]
            text = after.lstrip().removeprefix("</think>").lstrip("\n")
        return ParsedReply(text=text, reasoning=parsed.reasoning)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The tokens as text."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
