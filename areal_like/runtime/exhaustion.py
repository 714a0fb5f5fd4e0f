"""Ends a process that cannot get more memory or threads, so that its supervisor restarts it at once.

When a new thread fails before it has reported its start, Python reports an "ignored" exception, and
`Thread.start` waits without a limit; an event loop only logs the exception of a callback. Either way the
process stalls until a time limit in another process ends it. Errors in the code of tasks and agents are
handled elsewhere: code that requests too much memory fails alone.

The first Python frame of a new thread needs memory too, so the hook must not be Python code: it is the method
of a queue, and a thread that is already running does the rest.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
from typing import Any

from areal_like.runtime.threads import NamedThread

_LAST_WORDS = (
    b"the process ends: it gets no more memory, or no more threads (see ulimit -v, ulimit -u, and the limits "
    b"of its cgroup)\n"
)


def end_if_threads_fail() -> None:
    """From now on, ends this process when one of its threads cannot start for lack of memory."""
    errors: queue.SimpleQueue[sys.UnraisableHookArgs] = queue.SimpleQueue()

    def watch() -> None:
        while True:
            unraisable = errors.get()
            if is_exhausted(unraisable.exc_value) and "thread started" in (unraisable.err_msg or ""):
                _end()
            sys.__unraisablehook__(unraisable)

    NamedThread(watch, name="unraisable").start()
    sys.unraisablehook = errors.put


def end_if_callbacks_fail(loop: asyncio.AbstractEventLoop) -> None:
    """From now on, ends this process when a callback of the loop fails for lack of memory or threads."""

    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "handle" in context and is_exhausted(context.get("exception")):
            _end()
        loop.default_exception_handler(context)

    loop.set_exception_handler(handler)


def is_exhausted(error: BaseException | None) -> bool:
    """True if an error means that the process cannot get memory or a thread."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    )


def _end() -> None:
    """Writes the reason and exits. It does not use the log, whose lock another thread may hold, and which
    needs memory."""
    os.write(2, _LAST_WORDS)
    os._exit(1)
