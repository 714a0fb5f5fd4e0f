"""Names of parts of a step in a profile: phases, forward, head, objective, backward, optimizer, snapshot.

torch's own ranges cost some microseconds each even without a profiler; these cost one comparison then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "areal: "
"""Prefix of the names in a trace, so that they differ from the names of torch's operations."""

_is_recording = False


def record_ranges(is_recording: bool) -> None:
    global _is_recording
    _is_recording = is_recording


def named_range(name: str) -> AbstractContextManager[object]:
    return record_function(PREFIX + name) if _is_recording else nullcontext()


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that is one part of a step."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with named_range(name):
                return function(*args, **kwargs)

        return run

    return decorate
