"""Converts what a task's reward() returned to a checked `Score`. Pure.

A task may return a number, named parts whose sum is the reward, or a `Score`. The steps of a checked score
have positions; those of a task's may also have texts. Any other value raises a
RewardError that says what was wrong and what to return: it fails one sample and appears in the log.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import RewardError
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD, MAX_STEPS
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


def scorer_in(metric: str) -> tuple[str, str] | None:
    """(reward, identity of its reward model) in the name of a metric (`model/scorer/<identity>`); None in
    another's, such as `my_scorer/accuracy`."""
    reward, found, identity = f"/{metric}".rpartition(f"/{SCORER}")
    return (reward[1:], identity) if found else None


def score_fields(score: Score) -> list[Any]:
    """Returns a checked score as the values of one frame."""
    tokens = np.asarray(score.tokens, np.float32).tobytes() if len(score.tokens) else b""
    steps = [list(step) for step in score.steps]
    return [score.value, dict(score.parts), dict(score.metrics), list(score.turns), tokens, steps]


def score_of(fields: Any) -> Score:
    """Builds a score from the output of `score_fields`, unchecked. Raises ValueError or TypeError for
    anything else."""
    value, parts, metrics, turns, tokens, steps = fields
    return Score(
        value=value,
        parts=parts,
        metrics=metrics,
        turns=tuple(turns),
        tokens=np.frombuffer(tokens, np.float32) if tokens else (),  # type: ignore[arg-type]
        steps=tuple((end, reward) for end, reward in steps),
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
    steps = _steps(score.steps, str(completion))
    if steps and len(tokens):
        raise RewardError("the Score has rewards of steps and of tokens: give one of the two")
    return Score(
        value=number_of(score.value, of="Score.value"),
        parts=parts,
        metrics=metrics,
        turns=tuple(turns.tolist()),
        tokens=tokens,  # type: ignore[arg-type]  # an array is as good as a sequence
        steps=steps,
    )


def _steps(values: Any, text: str) -> tuple[tuple[int, float], ...]:
    """Returns (end in characters, reward as a float32) of each step. Raises RewardError."""
    try:
        steps = [tuple(step) for step in values]
    except TypeError as error:
        raise RewardError(f"Score.steps must be a list of pairs (end, reward): {error}") from None
    if len(steps) > MAX_STEPS:
        raise RewardError(f"Score.steps has {len(steps)} steps: at most {MAX_STEPS} are accepted")
    checked: list[tuple[int, float]] = []
    end = 0
    for number, step in enumerate(steps):
        of = f"Score.steps[{number}]"
        if len(step) != 2:
            raise RewardError(f"{of} must be a pair (end, reward) or (text, reward), got {len(step)} values")
        where, reward = step
        end = (
            _end_of_piece(where, text, end, of=of)
            if isinstance(where, str)
            else _end_of(where, text, end, of)
        )
        checked.append((end, float(np.float32(number_of(reward, of=f"the reward of {of}")))))
    return tuple(checked)


def _end_of(position: Any, text: str, before: int, of: str) -> int:
    """Returns the position if it is after the step `before` and within the text. Raises RewardError."""
    try:
        end = operator.index(position)
    except TypeError:
        raise RewardError(
            f"{of} must begin with a whole number of characters or a text, got {position!r:.100}"
        ) from None
    if not before < end <= len(text):
        raise RewardError(
            f"{of} ends at {end}: want an end above {before}, the end of the step before it, and at most "
            f"{len(text)}, the length of the completion"
        )
    return end


def _end_of_piece(piece: str, text: str, before: int, *, of: str) -> int:
    """Returns the end of a step with this text, after the step that ends at `before`. Raises RewardError."""
    at = text.find(piece, before)
    if not piece or at < 0 or text[before:at].strip():
        raise RewardError(
            f"{of} is {piece[:40]!r}, but the completion goes on with {text[before : before + 40]!r}: "
            "give the steps' texts in order, with nothing but whitespace between them"
        )
    return at + len(piece)


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
