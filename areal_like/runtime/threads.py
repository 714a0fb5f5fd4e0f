"""Threads that the kernel knows by name, and blocking calls in daemon threads.

A call that hangs in such a thread blocks neither the event loop nor the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class NamedThread(threading.Thread):
    """A daemon thread whose name `top -H`, `perf` and /proc/PID/task/TID/comm show: its first 15 characters.

    Python before 3.14 does not tell the kernel, which then shows the name of the program. Linux only: on
    other systems it is an ordinary thread.
    """

    def __init__(self, work: Callable[[], object], *, name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)

    def run(self) -> None:
        """Sets the name, then does the work."""
        with contextlib.suppress(OSError):
            Path("/proc/thread-self/comm").write_text(self.name[:15])
        super().run()


def in_thread(work: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """A future with the result or exception of `work`.

    Cancelling it does not stop `work`; the result is discarded.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def main() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, work())
        except BaseException as error:  # re-raised where the future is awaited
            outcome = (future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
            loop.call_soon_threadsafe(deliver, *outcome)

    NamedThread(main, name=name).start()
    return future
