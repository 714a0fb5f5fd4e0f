"""The tokens of a conversation, and which of them are learned.

The text comes from the tokenizer's chat template and is tokenized once. The learned tokens are those of the
replies that the conversation marks, each with its end-of-turn token and without anything that the template
writes after it. The bounds of a reply are read from the template's `{% generation %}` blocks if it has some.
Otherwise three texts are compared: the messages before the reply with the generation prompt, the messages up
to the reply, and the whole. A template that renders earlier replies in another way when more messages follow
(it strips their reasoning, ...) gives several sequences, each as the policy would have seen it.

`apply_chat_template(return_assistant_tokens_mask=True)` is not used: if a reply begins or ends with white
space that belongs to a longer token, it leaves out the rest of the conversation, or learns all of it.

Imports no torch, and transformers only on use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from areal_like.chat.messages import cannot_render, parsed_messages
from areal_like.chat.token_row import TokenRow
from areal_like.data.row_format import ConversationRow, Message
from areal_like.errors import ConfigError

log = logging.getLogger(__name__)

Span = tuple[int, int]
"""Characters [begin, end) of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_REPLY = "ProbeReply"
_REASONING = "reasoning_content"


class ConversationTokens:
    """Makes rows of tokens from conversations, for one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_token_ids: Sequence[int] = (),
        vocab_size: int = 0,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`tokenizer`: a tokenizer of transformers. `stop_token_ids`: those that end a turn, besides the
        tokenizer's EOS and the token with which its template ends one. `vocab_size`: every token id must be
        below it; 0: not checked. `template_kwargs`: `model.chat_template_kwargs`. Raises ConfigError for a
        slow tokenizer, and one without an EOS."""
        if not tokenizer.is_fast:
            raise ConfigError(
                "model.path: the tokenizer has no tokenizer.json, from which the learned tokens are found: "
                "convert it with transformers, or choose another model"
            )
        if tokenizer.eos_token_id is None and not stop_token_ids:
            raise ConfigError("model.path: the tokenizer has no EOS token, so no completion would end")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template_kwargs = dict(template_kwargs or {})
        self._has_template = bool(tokenizer.chat_template)
        self._marks_replies = self._has_template and bool(
            _GENERATION.search(tokenizer.get_chat_template(chat_template=None))
        )
        eos = tokenizer.eos_token_id
        self._end_id = int(stop_token_ids[0] if eos is None else eos)
        self._stop_ids = {self._end_id, *stop_token_ids}
        if self._has_template and not self._marks_replies:
            self._stop_ids |= self._closing_ids()
        self._stop_texts = [tokenizer.decode([i]) for i in sorted(self._stop_ids)]
        self._warned = False

    def rows(self, conversation: ConversationRow) -> list[TokenRow]:
        """The sequences of a conversation: one, unless its template changes earlier messages.

        Raises ConfigError for messages that the template cannot render.
        """
        messages = conversation.messages
        last = len(messages) - 1
        if conversation.is_text:
            return [self._text_row(str(messages[0]["content"]), str(messages[1]["content"]))]
        if not self._has_template:
            if any(conversation.is_learned[:last]):
                raise ConfigError(
                    "the tokenizer has no chat template, which conversations of several replies need: add "
                    "chat_template.jinja to the model's directory"
                )
            # As `rollout_server` renders such prompts.
            prompt = "\n".join(message["content"] for message in messages[:last]) + "\n"
            return [self._text_row(prompt, messages[last]["content"])]
        messages = parsed_messages(messages)
        sequences = (
            [self._marked(messages, conversation)]
            if self._marks_replies
            else self._by_prefixes(messages, conversation)
        )
        return [self._row(text, spans) for text, spans in sequences]

    def _text_row(self, prompt: str, completion: str) -> TokenRow:
        """A prompt and its completion as texts, and the EOS, which is learned too."""
        encoded = self._tokenizer(
            prompt + completion, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        tokens: list[int] = list(encoded["input_ids"])
        mask = _mask(encoded["offset_mapping"], [(len(prompt), len(prompt) + len(completion))])
        mask = [int(m and not s) for m, s in zip(mask, encoded["special_tokens_mask"], strict=True)]
        if tokens and tokens[-1] in self._stop_ids:
            mask[-1] = 1
        else:
            tokens, mask = [*tokens, self._end_id], [*mask, 1]
        return self._checked(tokens, mask)

    def _row(self, text: str, spans: Sequence[Span]) -> TokenRow:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return self._checked(list(encoded["input_ids"]), _mask(encoded["offset_mapping"], spans))

    def _checked(self, tokens: list[int], mask: list[int]) -> TokenRow:
        if self._vocab_size and tokens and max(tokens) >= self._vocab_size:
            raise ConfigError(f"token id {max(tokens)}: the model's vocabulary has {self._vocab_size}")
        # Nothing that the template writes after the last end of turn is learned.
        num_kept = max((at + 1 for at, learned in enumerate(mask) if learned), default=len(mask))
        return TokenRow(tokens=tokens[:num_kept], loss_mask=mask[:num_kept])

    def _marked(self, messages: list[Message], conversation: ConversationRow) -> tuple[str, list[Span]]:
        """The text and its learned spans, by the template's `generation` blocks."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # annotated with other types than it returns
        tokenizer, tools = self._tokenizer, conversation.tools or None
        try:
            (text,), (spans,) = render(
                conversations=[messages],
                tools=tools,
                chat_template=tokenizer.get_chat_template(chat_template=None, tools=tools),
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **self._template_kwargs},
            )
        except Exception as error:  # a template may raise anything
            raise cannot_render(error) from error
        first = conversation.is_learned.index(True)
        if any(message["role"] == "assistant" for message in messages[:first]):
            prompt = self._text(messages[:first], conversation, True)
            if not text.startswith(prompt):
                raise ConfigError(
                    "the chat template changes the prompt when the completion follows, so the learned tokens "
                    "are not known: give the row as `messages`"
                )
            spans = [span for span in spans if span[0] >= len(prompt)]
        return text, [(int(begin), int(end)) for begin, end in spans]

    def _by_prefixes(
        self, messages: list[Message], conversation: ConversationRow
    ) -> list[tuple[str, list[Span]]]:
        """Texts with their learned spans, found by comparing the template's renderings of prefixes."""
        sequences: list[tuple[str, list[Span]]] = []
        for at, is_learned in enumerate(conversation.is_learned):
            if not is_learned:
                continue
            prompt = self._text(messages[:at], conversation, True)
            until = self._text(messages[: at + 1], conversation, False)
            if not until.startswith(prompt):
                raise ConfigError(
                    f"the chat template's prompt for a reply ends with {prompt[-20:]!r}, with which the "
                    "rendered reply does not begin: change model.chat_template_kwargs, or mark the replies "
                    "in the template with {% generation %}"
                )
            reasoning = str(messages[at].get(_REASONING) or "").strip()
            if reasoning not in until[len(prompt) :]:
                raise ConfigError(
                    f"the chat template leaves out `{_REASONING}` of a reply: put the reasoning into "
                    "`content`, or remove it"
                )
            span = (len(prompt), self._end_of_turn(until, begin=len(prompt)))
            if sequences:
                text, spans = sequences[-1]
                if prompt.startswith(text[: spans[-1][1]]):
                    sequences[-1] = (until, [*spans, span])
                    continue
            sequences.append((until, [span]))
        return sequences

    def _end_of_turn(self, text: str, *, begin: int) -> int:
        """The end of the first stop token from `begin` on; the end of the text if there is none."""
        ends = [at + len(stop) for stop in self._stop_texts if (at := text.find(stop, begin)) >= 0]
        if not ends and not self._warned:
            self._warned = True
            log.warning(
                "the chat template ends a reply with no stop token: the model will not learn to end its turns"
            )
        return min(ends, default=len(text))

    def _closing_ids(self) -> set[int]:
        """The special token with which the template ends a turn; for base models it is often not the EOS."""
        probe = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE_REPLY}]
        conversation = ConversationRow(messages=probe, is_learned=[False, True])
        try:
            closing = self._text(probe, conversation, False).partition(_PROBE_REPLY)[2]
        except ConfigError:  # the first row will fail with the template's own message
            return set()
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ids = self._tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
        return special & set(ids)

    def _text(self, messages: Sequence[Message], conversation: ConversationRow, adds_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=conversation.tools or None,
                    tokenize=False,
                    add_generation_prompt=adds_prompt,
                    **self._template_kwargs,
                )
            )
        except Exception as error:  # a template may raise anything
            raise cannot_render(error) from error


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that begins inside a span. `spans` ascend and do not overlap."""
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    offsets_T2 = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    begins_T, ends_T = offsets_T2[:, 0], offsets_T2[:, 1]
    # A token that is only white space may be reported without characters, at its end.
    begins_T = np.where(begins_T == ends_T, ends_T - 1, begins_T)
    mask_T = np.zeros(len(begins_T), dtype=bool)
    for begin, end in spans:
        mask_T |= (begin <= begins_T) & (begins_T < end)
    return [int(learned) for learned in mask_T]
