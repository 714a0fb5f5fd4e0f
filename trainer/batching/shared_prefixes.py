"""Finds prefixes that sequences of one micro-batch have in common, so that the model computes them once.

The samples of a group have the same prompt, the segments of a conversation begin alike, and tasks with a
system prompt begin alike in all groups. A causal model gives equal hidden states to equal prefixes, so the
rows of an earlier sequence serve the later ones:

    packed tokens  T:  a b c 1 2 | a b c 3 4 | a b c 3 5
    rows           U:  a b c 1 2 |       3 4 |         5

A sequence's own rows attend to all of its prefix, wherever it is computed. Gradients are exact: a shared row
gets the sum of the gradients of all sequences that read it. Which prefix is shared is a pure function of the
sequences' order.

With router replay a hidden state also depends on the experts of the tokens before it, so a prefix is shared
only as far as the recorded experts are equal too. An engine computes a prompt once and reuses it for the
samples of a group; where it has computed it twice and chosen other experts, the trainer does too. The last
token of a sequence has no recorded experts, so it is not part of a shared prefix.

Shape suffixes: T packed tokens, U rows that the model computes, N sequences, L layers with experts, K experts
of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHORTEST = 4
"""Shorter prefixes, in tokens, are not shared: attention would be less regular without a benefit."""
_TOKENS_PER_ROW = 8
"""This many tokens of shared prefixes count like one row in the budget of a micro-batch. They have only keys
and values in every layer and perhaps a log-prob, which is at most an eighth of a row's memory (4 of its 34
hidden sizes a layer; arXiv 2205.05198, section 4.1; less with grouped queries)."""
_LOOK_BACK = 8
"""Most earlier sequences with the same first tokens that a sequence is compared with."""


@dataclass(frozen=True, slots=True, eq=False)
class InputSequence:
    """One sequence as the model gets it."""

    tokens: NDArray[np.int32]
    experts_TLK: NDArray[Any] | None = None
    """The experts of each token but the last; None: its tokens are routed by the model."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_common(self, other: InputSequence, *, above: int) -> int:
        """Tokens of the longest prefix that `other` can compute for this sequence; 0 if not above `above`.

        The last token is never part of it: every sequence has at least one row of its own, and so a query.
        """
        tokens, others = self.tokens, other.tokens
        is_routed = self.experts_TLK is not None
        if is_routed != (other.experts_TLK is not None):
            return 0
        end = min(len(tokens) - 1, len(others) - is_routed)
        if end <= above or others[above] != tokens[above]:
            return 0
        length = (others[:end] != tokens[:end]).tobytes().find(1)
        if length < 0:
            length = end
        if self.experts_TLK is not None and other.experts_TLK is not None and length > above:
            length = _num_equal_rows(self.experts_TLK[:length], other.experts_TLK[:length])
        return length if length > above else 0


def _num_equal_rows(left: NDArray[Any], right: NDArray[Any]) -> int:
    """Number of first rows that are equal in two arrays of equal shapes."""
    differs = (left != right).any(axis=(1, 2))
    return int(differs.argmax()) if differs.any() else len(left)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The prefix of a sequence that is computed by an earlier sequence of the micro-batch."""

    length: int = 0
    """Number of tokens; the last token of a sequence is never part of it."""
    source: int = -1
    """Index in 0..N-1 of the earlier sequence."""


_NO_PREFIX = Prefix()


def budget_size(num_tokens: int, *, prefix: int) -> int:
    """The part of a micro-batch's budget that a sequence needs, of which `prefix` tokens are shared."""
    return num_tokens - prefix + -(-prefix // _TOKENS_PER_ROW)


class PrefixFinder:
    """The prefixes of a growing micro-batch: find(), then append(), for each sequence in packed order."""

    def __init__(self) -> None:
        self._num_sequences = 0
        self._earlier: dict[bytes, list[tuple[int, InputSequence]]] = {}

    def find(self, sequence: InputSequence) -> Prefix:
        """The longest prefix shared with an earlier sequence; of several, the most recent sequence is
        taken."""
        best, source = 0, -1
        for index, other in reversed(self._earlier.get(_first_tokens(sequence), ())):
            if length := sequence.num_common(other, above=best):
                best, source = length, index
        return Prefix(length=best, source=source) if best >= _SHORTEST else _NO_PREFIX

    def append(self, sequence: InputSequence) -> None:
        """Adds a sequence, with which later ones may share a prefix."""
        alike = self._earlier.setdefault(_first_tokens(sequence), [])
        alike.append((self._num_sequences, sequence))
        del alike[:-_LOOK_BACK]
        self._num_sequences += 1

    def copy(self) -> PrefixFinder:
        """A copy of this finder, to try further sequences."""
        copied = PrefixFinder()
        copied._num_sequences = self._num_sequences
        copied._earlier = {first: list(alike) for first, alike in self._earlier.items()}
        return copied


def _first_tokens(sequence: InputSequence) -> bytes:
    return sequence.tokens[:_SHORTEST].tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedRows:
    """The row of the model's input for each packed token, on the host."""

    row_T: NDArray[np.int64]
    """Index into U of each packed token's row."""
    token_U: NDArray[np.int64]
    """Index into T of the token that each row computes: the first that stands for it, ascending."""
    own_lengths: tuple[int, ...]
    """[N] number of rows that each sequence adds, at least 1: its tokens after the shared prefix."""

    @classmethod
    def of(cls, sequences: Sequence[InputSequence]) -> SharedRows | None:
        """The rows of sequences in packed order; None if no two of them have a prefix in common."""
        finder = PrefixFinder()
        prefixes = []
        for sequence in sequences:
            prefixes.append(finder.find(sequence))
            finder.append(sequence)
        if not any(prefix.length for prefix in prefixes):
            return None
        rows: list[NDArray[np.int64]] = []
        own_lengths: list[int] = []
        tokens_U: list[NDArray[np.int64]] = []
        num_rows = num_tokens = 0
        for sequence, prefix in zip(sequences, prefixes, strict=True):
            length = sequence.num_tokens
            own = length - prefix.length
            shared = rows[prefix.source][: prefix.length] if prefix.length else np.zeros(0, dtype=np.int64)
            rows.append(np.concatenate([shared, np.arange(num_rows, num_rows + own)]))
            tokens_U.append(np.arange(num_tokens + prefix.length, num_tokens + length))
            own_lengths.append(own)
            num_rows += own
            num_tokens += length
        return cls(
            row_T=np.concatenate(rows), token_U=np.concatenate(tokens_U), own_lengths=tuple(own_lengths)
        )
