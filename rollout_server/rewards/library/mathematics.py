"""The reward for mathematics: 1 if the completion's final answer equals the row's, by math-verify.

math-verify (Hugging Face, https://github.com/huggingface/Math-Verify) finds the last box, formula or number
in a text, parses it with sympy, and compares values, sets, intervals, matrices and equations. sympy can take
forever (`9^{9^{9^9}}`), so one operating system timer limits the whole comparison. Its signal is delivered to
the main thread, where reward workers compute; in any other thread only the worker's own limit applies. That
limit also covers code that Python cannot interrupt (one operation on huge integers).
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
    """Not an Exception, because the libraries catch those and would continue."""


@dataclass(frozen=True, kw_only=True)
class Mathematics(RewardFunction):
    """`{name: math}`."""

    timeout_s: float = 3.0
    """Time limit for parsing and comparing one completion, in seconds. When it is exceeded, the reward is 0
    and the metric `timeouts` is 1."""
    strict: bool = True
    """True: variable names matter, and a set does not equal a tuple (math-verify's `strict`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timeout_s > 0:
            raise ConfigError(f"task.reward.timeout_s={self.timeout_s:g}: must be above 0")

    @property
    def own_name(self) -> str:
        """`math`."""
        return "math"

    def check(self) -> None:
        """Raises ConfigError if math-verify cannot be imported."""
        _library()

    def score(self, example: Example, completion: Completion) -> Score:
        """Returns 1.0 or 0.0. Metrics: `parsed` is 1 if the completion has an answer, `timeouts` 1 after a
        timeout.

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
            text = f"\\boxed{{{text}}}"  # otherwise only a number in it would be found
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
    """Parses a row's answer; cached, because all samples of a group have the same one."""
    return _parse(text)


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = _library().parse(text, parsing_timeout=None)
    return parsed


@functools.cache
def _library() -> Any:
    """Returns the package. Raises ConfigError if it is not installed."""
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(
            f"task.reward=math needs an extra: pip install 'areal-like[rewards]' ({error})"
        ) from error
    # Otherwise each call without its own timeouts, and each text that it cannot parse, would be logged.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Its lazy imports must not count towards the time of the first completion.
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
