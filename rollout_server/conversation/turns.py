"""The turns of a conversation as a tree of token sequences, and the tree as a trajectory. Pure.

Each path from a root to a leaf is a segment. A turn that several segments share is sampled tokens in the
first of them, and context in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED
from rollout_server.conversation.scoring import Span
from rollout_server.environments.base import Message, Reply


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One turn of the policy. All arrays are of its own tokens."""

    parent: Turn | None
    """The turn whose tokens come before `context`; None: the turn begins a segment."""
    context: NDArray[np.int32]
    """[C] tokens between the parent and this turn."""
    sampled: NDArray[np.int32]
    """[S] the turn."""
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    messages: list[Message]
    """The whole conversation up to this turn, whose reply is the last."""
    end: int
    """Number of tokens from the beginning of the segment up to and with this turn."""

    @property
    def path(self) -> list[Turn]:
        """The turns of the segment up to and with this one."""
        turns, turn = [self], self.parent
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[end] all tokens of the segment up to and with this turn."""
        return np.concatenate([array for turn in self.path for array in (turn.context, turn.sampled)])


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningTurn:
    """A turn that is being sampled."""

    parent: Turn | None
    most_tokens: int
    """Length of its segment if it becomes as long as it may."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One turn of the policy, and the tokens behind it."""

    reply: Reply
    prompt_ids: NDArray[np.int32]
    """[P] the tokens that the engine was given."""
    token_ids: NDArray[np.int32]
    """[S] the sampled tokens."""
    logprobs: NDArray[np.float32]
    """[S] of the sampled tokens."""
    turn: Turn | None
    """None if nothing was sampled."""


class Layout:
    """The arrays of a trajectory of several segments, which are in the order of their last turns."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        """`turns`: all of a conversation, at least one, each behind its parent."""
        self._pieces: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]] = []
        self.num_tokens = 0
        self.segments: list[int] = []
        """Lengths of the segments."""
        spans: dict[Turn, Span] = {}
        extended = {turn.parent for turn in turns}
        for leaf in turns:
            if leaf in extended:
                continue
            for turn in leaf.path:
                self._append_context(turn.context)
                if turn in spans:
                    self._append_context(turn.sampled)
                    continue
                first = self.num_tokens
                self._append(turn.sampled, turn.logprobs, turn.versions)
                spans[turn] = (first, self.num_tokens)
            self.segments.append(leaf.end)
        self.spans = [spans[turn] for turn in turns]
        """(first, end) of the sampled tokens of each turn, in the order of `turns`."""
        self.tokens, self.logprobs, self.versions = map(np.concatenate, zip(*self._pieces, strict=True))

    def _append_context(self, tokens: NDArray[np.int32]) -> None:
        num_tokens = len(tokens)
        self._append(tokens, np.zeros(num_tokens, np.float32), np.full(num_tokens, NOT_SAMPLED, np.int32))

    def _append(
        self, tokens: NDArray[np.int32], logprobs: NDArray[np.float32], versions: NDArray[np.int32]
    ) -> None:
        self._pieces.append((tokens, logprobs, versions))
        self.num_tokens += len(tokens)
