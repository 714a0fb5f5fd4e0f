"""Stop texts: ends a sequence at the first of its tokens with which one of some texts is complete.

Both engines run without a tokenizer, so the client looks for stop texts in the tokens of the stream:

    chunk of tokens -> nothing found: wait for the next chunk
                    -> found: abort the request -> its last event -> cut where the text is complete

Tokens that the engine samples before the abort reaches it are dropped. Whether a sequence stops depends on
its past only, so the log-probs of the tokens that are kept are those of the policy. A text that is one token
of the vocabulary is a stop token of the request, too: there the engine stops by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason
from rollout_server.policy.types import Generation, Sampling

MAX_CHUNKS = 64
"""Most chunks of a stream in which stop texts are looked for: a chunk repeats all tokens before it."""
MIN_INTERVAL = 4
"""Least number of tokens between two such chunks."""
_INCOMPLETE = "\ufffd"
"""What decodes from a part of a character."""
_MAX_INCOMPLETE = 16
"""Most tokens that are kept until they make up characters: one has at most four bytes in UTF-8, and thus four
tokens, but a policy may sample bytes that make up none."""


class StopTokenizer(Protocol):
    """The part of a renderer that stop texts need."""

    def text_of(self, tokens: Sequence[int]) -> str:
        """Text of these tokens, with special tokens."""

    def token_of(self, text: str) -> int | None:
        """The token whose text is exactly this, if there is one."""


class StopFinder:
    """Looks for stop texts in the tokens of one turn, which are given one by one."""

    def __init__(self, texts: Sequence[str], tokenizer: StopTokenizer) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._num_kept = max(map(len, texts)) - 1
        """Characters before the next token that may begin a stop text."""
        self._tail = ""
        self._tokens: list[int] = []
        """The newest tokens: those of the last complete characters, and those after them."""
        self._num_complete = 0
        """How many of them belong to complete characters, whose text is in the tail."""

    def find(self, token: int) -> str:
        """The stop text that this next token completes; empty: none."""
        self._tokens.append(token)
        # Decoded with tokens before it, because its text may depend on them. Those begin where a character
        # does: the text of a part of one differs from that of the whole.
        before = self._tokenizer.text_of(self._tokens[: self._num_complete])
        searched = self._tail + self._tokenizer.text_of(self._tokens)[len(before) :]
        for text in self._texts:
            if text in searched:
                return text
        num_incomplete = len(self._tokens) - self._num_complete
        if not searched.endswith(_INCOMPLETE) or num_incomplete > _MAX_INCOMPLETE:
            self._tail = searched[max(0, len(searched) - self._num_kept) :]
            del self._tokens[: self._num_complete]
            self._num_complete = len(self._tokens)
        return ""


class StopWatch:
    """Looks for the stop texts of one request in the events of its stream."""

    def __init__(self, sampling: Sampling, tokenizer: StopTokenizer, input_ids: Sequence[int]) -> None:
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._resumed = input_ids[len(input_ids) - sampling.num_resumed :]
        self.restart()

    def restart(self) -> None:
        """Forgets all events: the request is sent again."""
        self._finder = StopFinder(self._sampling.stop, self._tokenizer)
        for token in self._resumed:
            self._finder.find(int(token))
        self._num_read = 0
        self._end: int | None = None
        """Tokens up to the end of the first stop text; None: not found."""
        self._matched = ""

    def read(self, output_ids: Sequence[int]) -> bool:
        """Reads the tokens that are new since the last call, which `output_ids` repeats; true if a stop text
        was found now."""
        if self._end is not None:
            return False
        for token in output_ids[self._num_read :]:
            self._num_read += 1
            if matched := self._finder.find(int(token)):
                self._end, self._matched = self._num_read, matched
                return True
        return False

    def cut(self, generation: Generation) -> Generation:
        """The finished generation, without what follows the first stop text."""
        self.read(generation.output_ids.tolist())
        end = self._end
        if end is None:
            return generation
        return replace(
            generation,
            output_ids=generation.output_ids[:end],
            logprobs=generation.logprobs[:end],
            versions=generation.versions[:end],
            finish_reason=FinishReason.STOP,
            matched=self._matched,
            message="",
        )


class StopTexts:
    """Makes what requests with stop texts need; belongs to one client."""

    def __init__(self) -> None:
        self.tokenizer: StopTokenizer | None = None
        self._tokens: dict[str, int | None] = {}
        """The token of each text seen so far."""

    def prepare(self, sampling: Sampling, input_ids: Sequence[int]) -> tuple[dict[str, Any], StopWatch]:
        """SGLang's `sampling_params` of a request, and the watch over its stream. Raises EngineError if there
        is no tokenizer."""
        if self.tokenizer is None:
            raise EngineError("stop texts need the model's tokenizer (EngineClient.stop_texts)")
        for text in sampling.stop:
            if text not in self._tokens:
                self._tokens[text] = self.tokenizer.token_of(text)
        tokens = (*sampling.stop_token_ids, *(self._tokens[text] for text in sampling.stop))
        params = {
            "stop_token_ids": [token for token in dict.fromkeys(tokens) if token is not None],
            "stream_interval": max(MIN_INTERVAL, -(-sampling.max_new_tokens // MAX_CHUNKS)),
        }
        return params, StopWatch(sampling, self.tokenizer, input_ids)
