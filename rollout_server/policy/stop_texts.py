"""Stop texts: ends a sequence at the first token that completes one of the given texts.

Both engines run without a tokenizer, so the client looks for stop texts in the tokens of the stream:

    chunk of tokens -> nothing found: wait for the next chunk
                    -> found: abort the request -> its last event -> cut where the text is complete

Tokens that the engine samples before the abort reaches it are dropped. Whether a sequence stops depends only
on the tokens so far, so the log-probs of the kept tokens are still the policy's. A text that is a single
token of the vocabulary is also sent as a stop token, so that the engine stops by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason
from rollout_server.policy.generation import Generation, Sampling

MAX_CHUNKS = 64
"""Maximum number of chunks of a stream in which stop texts are searched; limited because a chunk repeats all
tokens before it."""
MIN_INTERVAL = 4
"""Minimum number of tokens between two such chunks."""
_INCOMPLETE = "\ufffd"
"""The result of decoding part of a character."""
_MAX_INCOMPLETE = 16
"""Maximum number of tokens held until they form characters: a character has at most four bytes in UTF-8, and
thus four tokens, but a policy may sample bytes that form none."""


class StopTokenizer(Protocol):
    """The part of a renderer that stop texts need."""

    def text_of(self, tokens: Sequence[int]) -> str:
        """Returns the text of these tokens, with special tokens."""

    def token_of(self, text: str) -> int | None:
        """Returns the token whose text is exactly this, if there is one."""


class StopFinder:
    """Searches for stop texts in the tokens of one turn, which are passed one by one."""

    def __init__(self, texts: Sequence[str], tokenizer: StopTokenizer) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._num_kept = max(map(len, texts)) - 1
        """Characters before the next token that may be the start of a stop text."""
        self._tail = ""
        self._tokens: list[int] = []
        """The newest tokens: those of the last complete characters, and all later ones."""
        self._num_complete = 0
        """Number of these tokens that belong to complete characters, whose text is in the tail."""

    def find(self, token: int) -> str:
        """Returns the stop text that the next token completes; empty if there is none."""
        self._tokens.append(token)
        # Decoded together with the tokens before it, because its text may depend on them. These start at a
        # character boundary, because part of a character decodes to other text than the whole.
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
    """Searches for the stop texts of one request in the events of its stream."""

    def __init__(self, sampling: Sampling, tokenizer: StopTokenizer, input_ids: Sequence[int]) -> None:
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._resumed = input_ids[len(input_ids) - sampling.num_resumed :]
        self.restart()

    def restart(self) -> None:
        """Forgets all events, because the request is sent again."""
        self._finder = StopFinder(self._sampling.stop, self._tokenizer)
        for token in self._resumed:
            self._finder.find(int(token))
        self._num_read = 0
        self._end: int | None = None
        """Number of tokens up to the end of the first stop text; None: not found."""
        self._matched = ""

    def read(self, output_ids: Sequence[int]) -> bool:
        """Reads the tokens added since the last call (`output_ids` has all of them); returns True if a stop
        text was just found."""
        if self._end is not None:
            return False
        for token in output_ids[self._num_read :]:
            self._num_read += 1
            if matched := self._finder.find(int(token)):
                self._end, self._matched = self._num_read, matched
                return True
        return False

    def cut(self, generation: Generation) -> Generation:
        """Returns the finished generation without the tokens after the first stop text."""
        self.read(generation.output_ids.tolist())
        end = self._end
        if end is None:
            return generation
        routes, num_cut = generation.routes, len(generation.output_ids) - end
        return replace(
            generation,
            routes=None if routes is None else routes.rows(0, routes.num_tokens - num_cut),
            output_ids=generation.output_ids[:end],
            logprobs=generation.logprobs[:end],
            versions=generation.versions[:end],
            finish_reason=FinishReason.STOP,
            matched=self._matched,
            message="",
        )


class StopTexts:
    """Prepares requests with stop texts; belongs to one client."""

    def __init__(self) -> None:
        self.tokenizer: StopTokenizer | None = None
        self._tokens: dict[str, int | None] = {}
        """The token of each text seen so far."""

    def prepare(self, sampling: Sampling, input_ids: Sequence[int]) -> tuple[dict[str, Any], StopWatch]:
        """Returns SGLang's `sampling_params` of a request, and the watch over its stream. Raises EngineError
        without a tokenizer."""
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
