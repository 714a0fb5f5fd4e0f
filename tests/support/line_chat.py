"""A chat format for tests, without a template: each message is a line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rollout_server.environments.base import Message, ToolCall
from rollout_server.rendering.base import ChatRenderer, ParsedReply, ToolSchema

RENDERER = f"{__name__}.LineChat"
_CALL = re.compile(r"(\w+)\((.*)\)")


class LineChat(ChatRenderer):
    """A message is a line of text; `name(arguments)` is a call of a tool."""

    supports_tools = True

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See ChatRenderer."""
        text = "".join(f"{message['content']}\n" for message in messages)
        return list(self.tokenizer(text)["input_ids"])

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
    ) -> list[int] | None:
        """See ChatRenderer."""
        return self.render(new_messages)

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        """See ChatRenderer."""
        text = self.decode(completion_ids, skip_special_tokens=True)
        call = _CALL.fullmatch(text)
        calls = (ToolCall(id="", name=call[1], arguments=call[2]),) if call is not None else ()
        return ParsedReply(text="" if calls else text, tool_calls=calls)
