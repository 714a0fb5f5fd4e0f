"""A trajectory: one sample of a group, with its tokens, their log-probs and weight versions, and its reward.

All per-token arrays cover prompt and completion and have the same length T, so that a trajectory of many
turns (prompt, completion, tool output, completion, ...) has the same layout: `loss_mask` marks the tokens
that the policy sampled. A conversation that branched, or whose context was compacted, has several segments:
each is a sequence of its own for the model, and they lie end to end in the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from areal_like.wire.routes import Routes

NOT_SAMPLED = -1
"""Version of a token that the policy did not sample: prompt, tool output."""
LARGEST_REWARD = 1e9
"""Largest size of a reward, of its parts, and of the reward of a turn or a token. The trainer computes in
float32, in which the sums over a step of their second and fourth powers must stay finite."""
LARGEST_METRIC = float(np.finfo(np.float32).max)
"""Largest size of a metric of a sample. It is averaged in float64 and never trained on."""
GOLD_REWARD = "reward_gold"
"""Name of the metric of a sample that holds a reward which is not trained on (`task.gold_reward`)."""
LEAST_LOGPROB = -1e6
"""No engine that computes with float32 samples a token with a smaller log-prob."""
MAX_SAMPLE_S = 1e9
"""Longest time that a sample may have taken: 30 years."""


class FinishReason(StrEnum):
    """Why a trajectory ended."""

    STOP = "stop"
    """The policy sampled a stop token, which is the last token and in the loss mask."""
    LENGTH = "length"
    """The limit of new tokens was reached."""
    TIMEOUT = "timeout"
    """`rollout.sample_timeout_s` was reached; the tokens sampled by then are kept."""
    TURNS = "turns"
    """`episode.max_turns` was reached, and the environment was not done."""
    TOKENS = "tokens"
    """`episode.max_tokens` was reached: the episode has no room for another turn."""
    CONTEXT = "context"
    """The engine's context is full: the next turn's prompt leaves no room for a completion."""
    ABORT = "abort"
    """Generation was interrupted. Such a trajectory is resumed or counted, never trained on."""

    @property
    def is_truncated(self) -> bool:
        """True if a limit ended the trajectory and not the policy."""
        return self in _TRUNCATED


_TRUNCATED = frozenset(
    {
        FinishReason.LENGTH,
        FinishReason.TIMEOUT,
        FinishReason.TURNS,
        FinishReason.TOKENS,
        FinishReason.CONTEXT,
    }
)
TOKEN_REWARDS = "token_rewards"
"""Name of the array float32[T] with a reward of each token (process rewards)."""
TEACHER_LOGPROBS = "teacher_logprobs"
"""Name of the array float32[T] with the log-prob of each sampled token under the sample's teacher, if that is
at a server (`distill.teachers`); 0 elsewhere."""
STEP_ENDS = "step_ends"
"""Name of the array int32[K] with the end of each rewarded step within a turn: its last token is at end - 1.
It ascends; two steps that end within one token have the same end."""
STEP_REWARDS = "step_rewards"
"""Name of the array float32[K] with the rewards of those steps."""
MAX_STEPS = 4096
"""Most rewarded steps of one sample."""

_DTYPES = (
    ("tokens", np.dtype(np.int32)),
    ("loss_mask", np.dtype(np.uint8)),
    ("logprobs", np.dtype(np.float32)),
    ("versions", np.dtype(np.int32)),
)


_MAX_LOGPROB_BITS = int(np.float32(1e-5).view(np.int32))
"""Bit pattern of the largest value accepted as a log-prob: rounding may push the log-prob of a token with
probability 1 above 0."""
_NEGATIVE_INFINITY_BITS = int(np.float32(-math.inf).view(np.uint32))


REWARD_ROUNDING = 1e-9
"""Rewards that differ by at most this, relative to the larger one and to 1, are equal."""


def are_equal_rewards(rewards: Sequence[float]) -> bool:
    """True if the rewards, of which there is at least one, differ by no more than the rounding of a sum.

    A reward is a sum over turns and tokens: .1 + .2 + .3 is not .3 + .2 + .1, and dividing by a standard
    deviation would turn that difference into a signal.
    """
    low, high = min(rewards), max(rewards)
    return bool(high - low <= REWARD_ROUNDING * max(1.0, abs(low), abs(high)))


def least_logprob(values: NDArray[Any], *, name: str = "logprobs") -> float:
    """The smallest of these log-probs float32, of which there is at least one; 0 if none is below 0.

    Compares the bit patterns as integers, which is twice as fast as comparing floats: among negative floats
    the smallest has the largest pattern. Raises ValueError unless all are finite and at most 0 (up to
    rounding).
    """
    largest = np.maximum.reduce(values.view(np.uint32))
    if largest >= _NEGATIVE_INFINITY_BITS or np.maximum.reduce(values.view(np.int32)) > _MAX_LOGPROB_BITS:
        raise ValueError(f"trajectory.{name}: want finite values that are at most 0")
    return min(0.0, float(largest.view(np.float32)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """Tokens of one sample, with the log-probs and weight versions that off-policy learning needs.

    Raises ValueError for arrays of different lengths, a token in the loss mask without a version, or a
    log-prob above zero.
    """

    tokens: NDArray[np.int32]
    """[T] prompt and completion token ids."""
    loss_mask: NDArray[np.uint8]
    """[T] 1 where the policy sampled the token, else 0."""
    logprobs: NDArray[np.float32]
    """[T] behavior log-prob of each sampled token under temperature-scaled logits, from the engine; 0
    elsewhere."""
    versions: NDArray[np.int32]
    """[T] version of the weights that sampled each token, from the engine; NOT_SAMPLED elsewhere."""
    reward: float
    """Scalar reward of the whole trajectory. It includes the rewards of turns, steps and tokens; the
    remainder belongs to the last sampled token."""
    reward_components: dict[str, float] = field(default_factory=dict)
    """Named parts of the reward, for metrics."""
    segments: tuple[int, ...] = ()
    """Lengths of the segments, which add up to T; empty: one segment. A token that two branches share is in
    the loss mask of the first only."""
    turns: tuple[tuple[int, float], ...] = ()
    """(end, reward) of each turn of the policy, in order: its last token is at `end` - 1. Empty: one turn."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Named numbers that are not part of the reward (tool calls, ...)."""
    label: str = ""
    """The task that the sample belongs to, if a job has several."""
    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    """Further arrays by name (`TOKEN_REWARDS`, teacher scores, ...). An array whose first dimension is T is
    per token."""
    finish_reason: FinishReason
    is_greedy: bool = False
    """Sampled at temperature 0, for evaluation or as a group's baseline; never trained on, its log-probs are
    unused."""
    generation_s: float = 0.0
    """Seconds from submitting to the engine to the last token."""
    reward_s: float = 0.0
    """Seconds spent computing the reward."""
    routes: Routes | None = None
    """Experts that the engine chose for each token but the last of each segment, in the order of the
    segments. They travel beside the record. None without `model.router_replay`, and for greedy samples."""

    @classmethod
    def unchecked(cls, **fields: Any) -> Self:
        """A trajectory of one segment and one turn, built without checks: all fields must be known to be
        valid.

        It is for records, whose bytes were checked when they were received; ranks decode every sample.
        """
        trajectory = object.__new__(cls)
        trajectory.__dict__.update(fields)
        return trajectory

    def __post_init__(self) -> None:
        # Every rank runs this for each sample: one pass over each array, with a single temporary.
        for name, dtype in _DTYPES:
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1 or len(array) != len(self.tokens):
                raise ValueError(
                    f"trajectory.{name}: want {dtype.name}[{self.tokens.size}], "
                    f"got {array.dtype.name}{list(array.shape)}"
                )
        if not len(self.tokens) or np.maximum.reduce(self.loss_mask) > 1:
            raise ValueError("trajectory.loss_mask: want at least one token and only 0 or 1")
        if np.minimum.reduce(self.tokens) < 0:
            raise ValueError("trajectory.tokens: negative token id")
        if (self.versions >= 0).tobytes() != self.loss_mask.tobytes():
            raise ValueError("trajectory.versions: a version is needed exactly where loss_mask is 1")
        least_logprob(self.logprobs)
        if not math.isfinite(self.reward):
            raise ValueError(f"trajectory.reward: not finite ({self.reward})")
        if self.segments or self.turns or self.metrics or self.arrays:
            self._check_structure()
        if self.routes is not None:
            self._check_routes(self.routes)

    def _check_structure(self) -> None:
        if self.segments and (min(self.segments) < 1 or sum(self.segments) != len(self.tokens)):
            raise ValueError(f"trajectory.segments: {self.segments} do not cover {len(self.tokens)} tokens")
        ends = [0, *(end for end, _ in self.turns)]
        if any(left >= right for left, right in pairwise(ends)) or ends[-1] > len(self.tokens):
            raise ValueError("trajectory.turns: want increasing ends within the tokens")
        if any(not self.loss_mask[end - 1] for end in ends[1:]):
            raise ValueError("trajectory.turns: the last token of a turn was not sampled")
        if self.turns and self.loss_mask[ends[-1] :].any():
            raise ValueError("trajectory.turns: tokens were sampled after the last turn")
        numbers = [*(reward for _, reward in self.turns), *self.metrics.values()]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("trajectory: the rewards of turns and the metrics must be finite")
        rewards = self.arrays.get(TOKEN_REWARDS)
        if rewards is not None and (
            rewards.dtype != np.float32
            or rewards.shape != self.tokens.shape
            or not np.isfinite(rewards).all()
        ):
            raise ValueError(f"trajectory.{TOKEN_REWARDS}: want finite float32[{len(self.tokens)}]")
        teacher = self.arrays.get(TEACHER_LOGPROBS)
        if teacher is not None:
            if teacher.dtype != np.float32 or teacher.shape != self.tokens.shape:
                raise ValueError(f"trajectory.{TEACHER_LOGPROBS}: want float32[{len(self.tokens)}]")
            least_logprob(teacher, name=TEACHER_LOGPROBS)
        if STEP_ENDS in self.arrays or STEP_REWARDS in self.arrays:
            self._check_steps()

    def _check_steps(self) -> None:
        ends, rewards = self.arrays.get(STEP_ENDS), self.arrays.get(STEP_REWARDS)
        if (
            ends is None
            or rewards is None
            or ends.dtype != np.int32
            or rewards.dtype != np.float32
            or ends.ndim != 1
            or ends.shape != rewards.shape
            or not 0 < len(ends) <= MAX_STEPS
            or not np.isfinite(rewards).all()
        ):
            raise ValueError(
                f"trajectory.{STEP_ENDS}, {STEP_REWARDS}: want int32[K] and finite float32[K], K at most "
                f"{MAX_STEPS}"
            )
        if ends.min() < 1 or ends.max() > len(self.tokens) or (np.diff(ends.astype(np.int64)) < 0).any():
            raise ValueError(f"trajectory.{STEP_ENDS}: want ascending ends within the tokens")
        if not self.loss_mask[ends - 1].all():
            raise ValueError(f"trajectory.{STEP_ENDS}: the last token of a step was not sampled")

    def _check_routes(self, routes: Routes) -> None:
        num_rows = len(self.tokens) - (len(self.segments) or 1)
        if routes.num_tokens != num_rows:
            raise ValueError(
                f"trajectory.routes: want those of {num_rows} tokens (all but the last of each segment), "
                f"got those of {routes.num_tokens}"
            )

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.tokens)

    @property
    def segment_slices(self) -> list[slice]:
        """The tokens of each segment."""
        if not self.segments:
            return [slice(0, len(self.tokens))]
        ends = accumulate(self.segments, initial=0)
        return [slice(start, end) for start, end in pairwise(ends)]

    @property
    def segment_routes(self) -> list[Routes] | None:
        """The routes of each segment: one row for each of its tokens but the last. None if there are none."""
        if self.routes is None:
            return None
        ends = accumulate((length - 1 for length in self.segments or (len(self.tokens),)), initial=0)
        return [self.routes.rows(start, end) for start, end in pairwise(ends)]

    @property
    def steps(self) -> list[tuple[int, float]]:
        """(end, reward) of each rewarded step within a turn, in order: its last token is at `end` - 1."""
        if STEP_ENDS not in self.arrays:
            return []
        return list(zip(self.arrays[STEP_ENDS].tolist(), self.arrays[STEP_REWARDS].tolist(), strict=True))

    @property
    def arrays_without_steps(self) -> dict[str, NDArray[np.generic]]:
        """The further arrays but those of the steps, for a copy with other tokens or another mask."""
        return {name: array for name, array in self.arrays.items() if name not in (STEP_ENDS, STEP_REWARDS)}

    @property
    def num_turns(self) -> int:
        return len(self.turns) or 1

    @property
    def oldest_version(self) -> int:
        """Smallest version among sampled tokens (NOT_SAMPLED if there is none)."""
        # As unsigned numbers, the versions of unsampled tokens are the largest.
        oldest = int(self.versions.view(np.uint32).min())
        return oldest if oldest < 1 << 31 else NOT_SAMPLED

    @property
    def newest_version(self) -> int:
        """Largest version among sampled tokens (NOT_SAMPLED if there is none)."""
        return max(NOT_SAMPLED, int(self.versions.max()))
