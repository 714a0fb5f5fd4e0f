"""One reply of a model, as the codecs of Responses and Messages write it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ChatReply:
    """One reply. The codecs write `text` only once it is complete, so that a client can send it back."""

    text: str
    reasoning: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """In OpenAI's chat format, each with a name and a JSON object as the text of its arguments."""
    is_cut: bool = False
    """True if a limit ended the reply."""
    stop_text: str = ""
    """The text of the request that ended the reply; empty: none."""
    num_prompt_tokens: int
    num_sampled_tokens: int
    logprobs: Sequence[Mapping[str, Any]] = ()
    """The sampled tokens as `chat_logprobs` writes them; empty if they were not requested."""
