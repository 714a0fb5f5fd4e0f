"""Converts what a task's reward() returned to a checked `Score`. Pure.

A task may return a number, named parts whose sum is the reward, or a `Score`. Any other value raises a
RewardError that says what was wrong and what to return: it fails one sample and appears in the log.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import RewardError
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD
from rollout_server.tasks.base import Completion, Score

MAX_NAMES = 1000
"""Maximum number of parts and metrics of one score together; the metadata of a record has room for about as
many."""
MAX_NAME_CHARS = 200
SCORER = "scorer/"
"""Beginning of the metric, always 1, whose name tells which reward model scored a sample."""


def as_score(returned: Any, completion: Completion, *, call: str = "reward") -> Score:
    """Returns the score; its `tokens` are float32[S]. `call`: the method that returned it. Raises
    RewardError."""
    if isinstance(returned, float):
        return Score(value=number_of(returned, of=f"{call}()"))
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # otherwise Python warns that it was never awaited
        raise RewardError(
            f"{call}() returned a {type(returned).__name__}: declare it as `async def {call}`, "
            "or return the number itself"
        )
    if isinstance(returned, Score):
        return _checked(returned, completion)
    if isinstance(returned, Mapping):
        parts = _numbers(returned, of=f"{call}()")
        if not parts:
            raise RewardError(f"{call}() returned an empty dict: name at least one part")
        return Score(value=number_of(math.fsum(parts.values()), of="the sum of the parts"), parts=parts)
    return Score(value=number_of(returned, of=f"{call}()"))


def score_fields(score: Score) -> list[Any]:
    """Returns a checked score as the values of one frame."""
    tokens = np.asarray(score.tokens, np.float32).tobytes() if len(score.tokens) else b""
    return [score.value, dict(score.parts), dict(score.metrics), list(score.turns), tokens]


def score_of(fields: Any) -> Score:
    """Builds a score from the output of `score_fields`, unchecked. Raises ValueError or TypeError for
    anything else."""
    value, parts, metrics, turns, tokens = fields
    return Score(
        value=value,
        parts=parts,
        metrics=metrics,
        turns=tuple(turns),
        tokens=np.frombuffer(tokens, np.float32) if tokens else (),  # type: ignore[arg-type]
    )


def _checked(score: Score, completion: Completion) -> Score:
    parts = _numbers(score.parts, of="Score.parts")
    metrics = _numbers(score.metrics, of="Score.metrics", largest=LARGEST_METRIC)
    if len(parts) + len(metrics) > MAX_NAMES:
        raise RewardError(
            f"the Score has {len(parts)} parts and {len(metrics)} metrics: at most {MAX_NAMES} are accepted"
        )
    turns = _array(score.turns, of="Score.turns", num=len(completion.turn_lengths), of_what="turns")
    tokens = _array(score.tokens, of="Score.tokens", num=len(completion.token_ids), of_what="sampled tokens")
    return Score(
        value=number_of(score.value, of="Score.value"),
        parts=parts,
        metrics=metrics,
        turns=tuple(turns.tolist()),
        tokens=tokens,  # type: ignore[arg-type]  # an array is as good as a sequence
    )


def number_of(value: Any, *, of: str, largest: float = LARGEST_REWARD) -> float:
    """Returns a finite number of at most `largest` in size. Raises RewardError. `of`: its name in errors."""
    if callable(item := getattr(value, "item", None)):
        try:
            value = item()  # numpy and torch scalars
        except (RuntimeError, ValueError) as error:
            raise RewardError(f"{of} must be one number, got {type(value).__name__}: {error}") from None
    if not isinstance(value, numbers.Real):
        raise RewardError(f"{of} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= largest:  # also if it is NaN
        raise RewardError(f"{of} must be a finite number of at most {largest:.4g} in size, got {number}")
    return number


def _numbers(named: Any, *, of: str, largest: float = LARGEST_REWARD) -> dict[str, float]:
    if not isinstance(named, Mapping):
        raise RewardError(f"{of} must be a dict of numbers, got {type(named).__name__}")
    if len(named) > MAX_NAMES:
        raise RewardError(f"{of} has {len(named)} names: at most {MAX_NAMES} are accepted")
    if long := next((name for name in named if len(str(name)) > MAX_NAME_CHARS), None):
        raise RewardError(
            f"{of} has a name of {len(str(long))} characters: at most {MAX_NAME_CHARS} are accepted"
        )
    return {
        str(name): number_of(value, of=f"{of}[{str(name)!r}]", largest=largest)
        for name, value in named.items()
    }


def _array(values: Any, *, of: str, num: int, of_what: str) -> NDArray[np.float32]:
    """Returns the numbers as float32[num], or float32[0] if there are none."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"{of} must be a list of numbers: {error}") from None
    if array.ndim != 1:
        raise RewardError(f"{of} must be a list of numbers, got an array of shape {list(array.shape)}")
    if len(array) not in (0, num):
        raise RewardError(
            f"{of} has {len(array)} numbers for {num} {of_what}: give one for each, or leave it empty"
        )
    is_absurd = ~(np.abs(array) <= LARGEST_REWARD)  # also if it is NaN
    if is_absurd.any():
        first = int(np.flatnonzero(is_absurd)[0])
        raise RewardError(
            f"{of} must be finite numbers of at most {LARGEST_REWARD:g} in size, "
            f"but number {first} is {array[first]}"
        )
    return array
