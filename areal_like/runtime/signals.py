"""SIGHUP reopens the log files (logrotate), SIGUSR1 logs the stacks of all threads and tasks.

A signal handler of Python may interrupt a log call in the main thread, so the handlers only write a byte into
a pipe, and a thread does the work. SIGUSR1 is also handled by `faulthandler`, which needs no Python code to
run: it writes the stacks to stderr even if the interpreter is hung in native code.

The same thread keeps the files of plain output below their limits (`logs.Outputs`).
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import select
import signal
import sys
import threading
import traceback
import weakref

from areal_like.runtime.logs import Outputs, reopen_logs

log = logging.getLogger(__name__)

_HANGUP, _STACKS = b"h", b"s"


def handle_log_signals(*, to_stderr: bool = True, hangup: bool = True) -> None:
    """Installs the handlers, in the main thread.

    `to_stderr`: SIGUSR1 also writes the stacks to stderr. `hangup`: handles SIGHUP; otherwise the caller
    does, and calls `request_reopen`.
    """
    reading, _Pipe.writing = os.pipe()
    os.set_blocking(_Pipe.writing, False)
    threading.Thread(target=_serve, args=(reading,), name="log-signals", daemon=True).start()
    if hangup:
        signal.signal(signal.SIGHUP, lambda *_: request_reopen())
    signal.signal(signal.SIGUSR1, lambda *_: _write(_STACKS))
    if to_stderr:
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=True)


def request_reopen() -> None:
    """Requests that the log files be reopened soon. Safe in a signal handler."""
    _write(_HANGUP)


class _Pipe:
    writing = -1


def _write(byte: bytes) -> None:
    with contextlib.suppress(BlockingIOError):  # thousands of signals are waiting: one more changes nothing
        os.write(_Pipe.writing, byte)


def _serve(reading: int) -> None:
    while True:
        if not select.select([reading], [], [], Outputs.CHECK_S)[0]:
            _shorten_outputs()
            continue
        if os.read(reading, 1) == _HANGUP:
            try:
                reopen_logs()
            except OSError as error:
                log.error("the log files could not be reopened: %s", error)
                continue
            log.info("SIGHUP: the log files were reopened")
        else:
            log.warning("SIGUSR1: the stacks of all threads and tasks", extra={"stacks": all_stacks()})


def _shorten_outputs() -> None:
    try:
        Outputs.shorten()
    except OSError as error:
        log.error("an output file has reached its size limit and was truncated without a copy: %s", error)


def all_stacks() -> str:
    """The stacks of all threads, then of the tasks of the loops that were passed to `show_tasks_of`."""
    out = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        out.write(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}\n")
    for task in [task for loop in list(_loops) for task in asyncio.all_tasks(loop)]:
        out.write(f"task {task.get_name()}\n")
        for frame in task.get_stack(limit=16):
            out.write("".join(traceback.format_stack(frame, limit=1)))
        out.write("\n")
    return out.getvalue()


_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def show_tasks_of(loop: asyncio.AbstractEventLoop) -> None:
    """Makes SIGUSR1 show the tasks of this event loop too."""
    _loops.add(loop)
