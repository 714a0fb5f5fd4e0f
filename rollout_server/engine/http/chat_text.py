"""The text of one answer while its tokens arrive: what can be sent, and where it stops. Pure.

The last tokens may be a part of a character, or the beginning of a stop text. Their text is kept back until
more tokens have arrived or the answer is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class AnswerText:
    """Gets all tokens so far again and again, and gives the text that is new and certain."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        """`decode`: text of tokens, without special tokens."""
        self._decode = decode
        self._stops = stops
        self._num_kept = max(map(len, stops), default=1) - 1
        """Characters at the end that may be the beginning of a stop text."""
        self.text = ""
        """What is certain."""
        self.has_stopped = False
        """A stop text was found; the text ends before it."""

    def read(self, tokens: Sequence[int], *, is_complete: bool) -> str:
        """The text that these tokens add to `text`; empty after a stop."""
        if self.has_stopped:
            return ""
        text = self._decode(tokens)
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.has_stopped = True
            text = text[: min(found)]
        elif not is_complete:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - self._num_kept] if self._num_kept else text
        # With some tokenizers the text of the first tokens changes when others follow: what is sent, is sent.
        new = text[len(self.text) :]
        self.text += new
        return new
