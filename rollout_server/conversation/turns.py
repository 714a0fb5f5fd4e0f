"""Samples the turns of one sample as a tree of token sequences, and converts the tree to a trajectory.

Each path from a root to a leaf is a segment. The tokens of a turn that several segments share count as
sampled in the first of them, and as context in the others. A sample of one prompt and one completion is a
tree with a single turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.scoring import SampleRewards, Span, placed_token_rewards, placed_turns
from rollout_server.environments.base import Message, Reply
from rollout_server.policy.generation import Generation


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One turn of the policy. All arrays cover only its own tokens."""

    parent: Turn | None
    """The turn whose tokens precede `context`; None: this turn starts a segment."""
    context: NDArray[np.int32]
    """[C] tokens between the parent and this turn."""
    sampled: NDArray[np.int32]
    """[S] sampled tokens of the turn."""
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    end: int
    """Number of tokens from the start of the segment through the end of this turn."""
    messages: list[Message] = field(default_factory=list)
    """The whole conversation, ending with this turn's reply; empty for a prompt given as tokens."""

    @property
    def path(self) -> list[Turn]:
        """The turns of the segment up to and including this one."""
        turns, turn = [self], self.parent
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    @property
    def tokens(self) -> NDArray[np.int32]:
        """[end] all tokens of the segment through the end of this turn."""
        return np.concatenate([array for turn in self.path for array in (turn.context, turn.sampled)])


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTurn:
    """One sampled turn: the parsed reply and its tokens."""

    reply: Reply
    prompt_ids: NDArray[np.int32]
    """[P] tokens of the prompt, as sent to the engine."""
    token_ids: NDArray[np.int32]
    """[S] the sampled tokens."""
    logprobs: NDArray[np.float32]
    """[S] log-probs of the sampled tokens."""
    turn: Turn | None
    """None if nothing was sampled."""


class Turns:
    """The turns of one sample so far. Belongs to one event loop; several may be sampled concurrently."""

    def __init__(self, policy: PolicyClient) -> None:
        self._policy = policy
        self._turns: list[Turn] = []
        """In the order in which they finished, so a turn comes after its parent."""
        self._running: list[tuple[Turn | None, int]] = []
        """The turns being sampled: parent, and length of the segment if the turn reaches its limit."""
        self._busy_since_s = 0.0
        self.generation_s = 0.0
        """Time with at least one turn at the engine or waiting for it, in seconds."""
        self.finish_reason = FinishReason.STOP
        """Reason why the last turn ended."""

    async def sample(
        self,
        prompt: NDArray[np.int32],
        parent: Turn | None = None,
        *,
        limit: tuple[int, FinishReason] | None = None,
        **options: Any,
    ) -> tuple[Generation, Turn | None]:
        """Samples the policy's next turn after these tokens, which start with those of `parent`.

        `limit`: maximum number of tokens, and the finish reason if it is reached. `options` and errors: see
        PolicyClient.sample. The returned turn is None if nothing was sampled.
        """
        num_tokens, reason = limit or (self._policy.max_new_tokens, FinishReason.LENGTH)
        running = (parent, len(prompt) + num_tokens)
        clock = asyncio.get_running_loop().time
        if not self._running:
            self._busy_since_s = clock()
        self._running.append(running)
        try:
            generation = await self._policy.sample(
                prompt, max_new_tokens=None if limit is None else num_tokens, **options
            )
        finally:
            self._running.remove(running)
            if not self._running:
                self.generation_s += clock() - self._busy_since_s
        self.finish_reason = generation.finish_reason
        if self.finish_reason is FinishReason.LENGTH:
            self.finish_reason = reason
        turn = None
        if len(generation.output_ids):
            turn = Turn(
                parent=parent,
                context=prompt[parent.end :] if parent is not None else prompt,
                sampled=generation.output_ids,
                logprobs=generation.logprobs,
                versions=generation.versions,
                end=len(prompt) + len(generation.output_ids),
            )
            self._turns.append(turn)
        return generation, turn

    def forget(self, turn: Turn) -> None:
        """Drops a turn that no client has read, unless another one follows it."""
        followed = {one.parent for one in self._turns} | {parent for parent, _ in self._running}
        if turn in self._turns and turn not in followed:
            self._turns.remove(turn)

    @property
    def is_sampling(self) -> bool:
        """True while a turn is being sampled or waits for the engine."""
        return bool(self._running)

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns, in the order in which they finished."""
        return self._turns

    @property
    def turn_lengths(self) -> list[int]:
        """Number of sampled tokens in each turn, in the order in which the turns finished."""
        return [len(turn.sampled) for turn in self._turns]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The sampled tokens of all turns, in the order in which the turns finished."""
        if len(self._turns) == 1:
            return self._turns[0].sampled
        return np.concatenate([turn.sampled for turn in self._turns] or [np.empty(0, np.int32)])

    def to_trajectory(
        self,
        outcome: SampleRewards,
        *,
        finish_reason: FinishReason | None = None,
        reward_s: float = 0.0,
        is_greedy: bool = False,
        label: str = "",
    ) -> Trajectory:
        """Converts the turns to a Trajectory; its segments are in the order of their last turns.

        `outcome`: its turns and tokens are in the order of `turn_lengths` and `token_ids`. `finish_reason`:
        None takes that of the last turn. Raises ValueError if nothing was sampled, if the outcome has another
        number of turns or tokens, and for invalid log-probs or versions.
        """
        if not self._turns:
            raise ValueError("the policy has sampled nothing")
        segments, spans, arrays = _layout(self._turns)
        tokens, logprobs, versions = arrays
        return Trajectory(
            tokens=tokens,
            loss_mask=(versions != NOT_SAMPLED).astype(np.uint8),
            logprobs=logprobs,
            versions=versions,
            reward=outcome.reward,
            reward_components=outcome.reward_components,
            segments=tuple(segments) if len(segments) > 1 else (),
            turns=placed_turns(outcome, spans),
            metrics=outcome.metrics,
            label=label,
            arrays=placed_token_rewards(outcome, spans, num_tokens=len(tokens)),
            finish_reason=finish_reason or self.finish_reason,
            is_greedy=is_greedy,
            generation_s=self.generation_s,
            reward_s=reward_s,
        )


def _layout(turns: Sequence[Turn]) -> tuple[list[int], list[Span], Iterator[NDArray[Any]]]:
    """Returns the lengths of the segments, in the order of their last turns; (first, end) of the sampled
    tokens of each turn, in the order of `turns`; and the tokens, log-probs and versions of all segments.

    `turns`: all turns of a conversation, at least one, each after its parent.
    """
    segments: list[int] = []
    spans: dict[Turn, Span] = {}
    pieces: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]] = []
    end = 0
    extended = {turn.parent for turn in turns}
    for leaf in turns:
        if leaf in extended:
            continue
        for turn in leaf.path:
            pieces.append(_as_context(turn.context))
            end += len(turn.context)
            first, end = end, end + len(turn.sampled)
            if turn in spans:
                pieces.append(_as_context(turn.sampled))
            else:
                pieces.append((turn.sampled, turn.logprobs, turn.versions))
                spans[turn] = first, end
        segments.append(leaf.end)
    arrays = map(np.concatenate, zip(*pieces, strict=True))
    return segments, [spans[turn] for turn in turns], arrays


def _as_context(
    tokens: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    return tokens, np.zeros(len(tokens), np.float32), np.full(len(tokens), NOT_SAMPLED, np.int32)
