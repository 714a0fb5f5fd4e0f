"""Ends a process that gets no more memory or threads, so that its supervisor starts it again at once.

When a new thread fails before it has told its starter that it runs, Python reports an "ignored" exception,
and `Thread.start` waits without a limit; an event loop only logs the exception of a callback. Either way the
process is stalled until a time limit of others ends it. Errors in the code of tasks and agents are handled
elsewhere: what asks for too much memory fails alone.

The first Python frame of a new thread needs memory too, so the hook may not be Python code: it is the method
of a queue, and a thread that runs already does the rest.
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
    """Ends this process, from now on, when one of its threads cannot begin for lack of memory."""
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
    """Ends this process, from now on, when a callback of the loop fails for lack of memory or threads."""

    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "handle" in context and is_exhausted(context.get("exception")):
            _end()
        loop.default_exception_handler(context)

    loop.set_exception_handler(handler)


def is_exhausted(error: BaseException | None) -> bool:
    """True if an error means that the process gets no memory or no thread."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    )


def _end() -> None:
    """Not through the log, whose lock another thread may hold, and which needs memory."""
    os.write(2, _LAST_WORDS)
    os._exit(1)
