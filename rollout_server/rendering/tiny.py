"""The chat format of the tiny model, with tool calls like `<call>add 37 85</call>`.

A call has the tool's name and its arguments in the order of the schema, separated by one space: a model of
0.3M parameters would need most of its tokens to write JSON. Everything else is the tokenizer's chat template
(`trainer.models.tiny_chat`), which only appends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial

from rollout_server.rendering.base import ParsedReply, ToolSchema
from rollout_server.rendering.jinja import JinjaRenderer, Markers, split_reply

_INTEGER = re.compile(r"-?[0-9]{1,18}")


class TinyRenderer(JinjaRenderer):
    """`model.renderer=rollout_server.rendering.tiny.TinyRenderer`."""

    markers = Markers(call_begin="<call>", call_end="</call>")

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        names = {
            tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in tools
        }
        text = self.decode([i for i in completion_ids if i not in self._hidden_ids])
        return split_reply(text, markers=self.markers, parse_call=partial(parse_words, parameters=names))


def parse_words(body: str, *, parameters: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """Parses `add 37 85` into name and arguments (a JSON object as text). Never raises.

    `parameters`: each tool's parameters, in order. Extra values are named by their position, so that the tool
    can report that it does not accept them. A word that is not an integer stays text.
    """
    name, *words = body.split(" ")
    names = parameters.get(name, ())
    values = [int(word) if _INTEGER.fullmatch(word) else word for word in words]
    places = [names[at] if at < len(names) else f"value {at + 1}" for at in range(len(values))]
    return name, json.dumps(dict(zip(places, values, strict=True)))
