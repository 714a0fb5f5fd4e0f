"""The reward for mathematics: 1 if the completion's final answer equals the row's, by math-verify.

math-verify (Hugging Face, https://github.com/huggingface/Math-Verify) finds the last box, formula or number
in a text, parses it with sympy, and compares values, sets, intervals, matrices and equations. sympy
can take for ever (`9^{9^{9^9}}`), so one timer of the operating system ends the whole comparison. Its signal
needs the main thread, where reward workers compute; in any other thread only the worker's own limit counts.
Code that Python cannot interrupt (one operation on huge integers) is also left to that limit.
"""

from __future__ import annotations

import functools
import importlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library.base import RewardFunction, place_of
from rollout_server.tasks.base import Completion, Example, Score

_FORMULA_MARKS = ("$", "\\boxed", "\\(", "\\[", "\\begin{")
_GSM8K_MARKER = "####"
_REPEAT_S = 0.5


class _TimeIsUpError(BaseException):
    """Not an Exception: the libraries catch those, and would continue."""


@dataclass(frozen=True, kw_only=True)
class Mathematics(RewardFunction):
    """`{name: math}`."""

    timeout_s: float = 3.0
    """Time limit of parsing and comparing one completion, in seconds. After it the reward is 0 and the metric
    `timeouts` 1."""
    strict: bool = True
    """Names of variables count, and a set is no tuple (math-verify's `strict`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timeout_s > 0:
            raise ConfigError(f"task.reward.timeout_s={self.timeout_s:g}: must be above 0")

    @property
    def own_name(self) -> str:
        """`math`."""
        return "math"

    def check(self) -> None:
        """math-verify can be imported."""
        _library()

    def score(self, example: Example, completion: Completion) -> Score:
        """1.0 or 0.0. Metrics: `parsed` is 1 if the completion has an answer, `timeouts` 1 after a time-out.

        Raises RewardError if the row's answer cannot be parsed.
        """
        library = _library()
        gold = self._gold(example)
        parsed: list[Any] = []
        try:
            with _limit(self.timeout_s):
                parsed = _parse(str(completion))
                is_equal = bool(
                    parsed and library.verify(gold, parsed, strict=self.strict, timeout_seconds=None)
                )
        except _TimeIsUpError:
            return Score(value=0.0, metrics={"parsed": float(bool(parsed)), "timeouts": 1.0})
        return Score(value=float(is_equal), metrics={"parsed": float(bool(parsed)), "timeouts": 0.0})

    def _gold(self, example: Example) -> list[Any]:
        text = "" if example.answer is None else str(example.answer)
        text = text.rpartition(_GSM8K_MARKER)[2].strip()
        if not any(mark in text for mark in _FORMULA_MARKS):
            text = f"\\boxed{{{text}}}"  # else only a number in it would be found
        try:
            with _limit(self.timeout_s):
                gold = _parsed_gold(text)
        except _TimeIsUpError:
            gold = []
        if not gold:
            raise RewardError(
                f"math-verify cannot parse the answer of {place_of(example)}: {str(example.answer)[:200]!r}; "
                "give a number or a formula (in $ or \\boxed{})"
            )
        return gold


@functools.lru_cache(maxsize=4096)
def _parsed_gold(text: str) -> list[Any]:
    """Cached: all samples of a group have the same."""
    return _parse(text)


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = _library().parse(text, parsing_timeout=None)
    return parsed


@functools.cache
def _library() -> Any:
    """The package. Raises ConfigError if it is not installed."""
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(
            f"task.reward=math needs an extra: pip install 'areal-like[rewards]' ({error})"
        ) from error
    # Each call without its own time-outs, and each text that it cannot parse, would be a line of the log.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # What it imports on use must not count as time of the first completion.
    library.parse("$1$", parsing_timeout=None)
    return library


@contextmanager
def _limit(timeout_s: float) -> Iterator[None]:
    """Raises _TimeIsUpError in the block after `timeout_s` seconds, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: object) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    # Again and again: the libraries have `except:` clauses that swallow the first one.
    signal.setitimer(signal.ITIMER_REAL, timeout_s, _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
