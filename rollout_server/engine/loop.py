"""The thread that owns the core: it steps while there is something to do, and runs commands between two steps.

All else in the process talks to the core through `call`, so the core needs no locks and a command never sees half a step. What is
reported leaves the thread as snapshots, because a running sequence changes with the next step. Time is accounted here: *idle* is
time with no runnable sequence (nothing there, or paused), *busy* is time inside steps.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from areal_like.errors import EngineError
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.base import Weights
from rollout_server.engine.scheduler import Finish, Sequence

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A sequence as it was at one moment."""

    sequence: Sequence
    output_ids: list[int]
    output_logprobs: list[float]
    version_spans: list[tuple[str, int, int]]
    finish: Finish | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """Counters and levels of the engine, read without stopping it."""

    running: int
    waiting: int
    rows: int
    paused: bool
    weight_version: str
    generated_tokens: int
    prefilled_tokens: int
    shared_prefixes: int
    """Sequences whose context was not computed again because another had."""
    steps: int
    busy_s: float
    idle_s: float
    swaps: int
    stall_s: float
    """Sum over swaps of the time from stopping to the next token."""


class EngineLoop:
    """Runs an EngineCore in a daemon thread until `stop`.

    `on_report` is called in that thread with what a step or command ended. If the core fails, `on_failure` is called once with
    the reason and every later `call` raises EngineError.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        num_threads: int,
        on_report: Callable[[list[Report]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._core = core
        self._num_threads = num_threads
        self._on_report = on_report
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[tuple[Callable[[EngineCore], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._failure = ""
        self._stopping = False
        self._idle_since_s: float | None = None
        self._idle_s = self._busy_s = self._stall_s = 0.0
        self._swaps = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> None:
        """Ends the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread steps."""
        return self._thread.is_alive() and not self._failure

    def call(self, command: Callable[[EngineCore], T]) -> Future[T]:
        """Runs `command` between two steps. Its exceptions are the future's."""
        future: Future[T] = Future()
        if not self.alive:
            future.set_exception(EngineError(f"the engine has stopped: {self._failure or 'shutting down'}"))
        else:
            self._commands.put((command, future))
        return future

    def abort(self, choose: Callable[[EngineCore], Iterable[Sequence]]) -> Future[None]:
        """Ends the chosen sequences with what they have; they are reported."""

        def command(core: EngineCore) -> None:
            self._report(core.abort(list(choose(core))))

        return self.call(command)

    def swap(self, weights: Weights, *, version: str, recompute: bool) -> Future[float]:
        """Activates weights between two steps. Returns the stall: seconds from stopping to the next token, rebuilding KV included."""

        def command(core: EngineCore) -> float:
            started_s = time.perf_counter()
            core.swap(weights, version=version, recompute=recompute)
            self._step()
            stall_s = time.perf_counter() - started_s
            self._stall_s += stall_s
            self._swaps += 1
            return stall_s

        return self.call(command)

    def load(self) -> Load:
        """A snapshot; taken from another thread, so levels may be a step apart from each other."""
        core, idle_since_s = self._core, self._idle_since_s
        current_idle_s = 0.0 if idle_since_s is None else time.perf_counter() - idle_since_s
        return Load(
            running=core.scheduler.num_running,
            waiting=len(core.scheduler.waiting),
            rows=core.scheduler.num_rows,
            paused=core.scheduler.paused,
            weight_version=core.version,
            generated_tokens=core.num_generated,
            prefilled_tokens=core.num_prefilled,
            shared_prefixes=core.num_prefix_hits,
            steps=core.num_steps,
            busy_s=self._busy_s,
            idle_s=self._idle_s + current_idle_s,
            swaps=self._swaps,
            stall_s=self._stall_s,
        )

    def _main(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    self._step()
        except (
            Exception
        ) as error:  # the thread's outermost frame: whoever waits must learn that nothing will come any more
            logger.exception("the engine failed")
            self._failure = f"{type(error).__name__}: {error}"
            self._on_failure(self._failure)
        self._fail_commands()

    def _run_commands(self) -> None:
        """Everything queued; waits for a command when there is nothing to step."""
        while True:
            wait = not self._core.scheduler.runnable
            try:
                entry = self._commands.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                self._idle_since_s = time.perf_counter()
                entry = self._commands.get()
                self._idle_s += time.perf_counter() - self._idle_since_s
                self._idle_since_s = None
            if entry is None:
                self._stopping = True
                return
            command, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command(self._core))
            except (ValueError, EngineError) as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise

    def _step(self) -> None:
        if not self._core.scheduler.runnable:
            return
        started_s = time.perf_counter()
        self._report(self._core.step())
        self._busy_s += time.perf_counter() - started_s

    def _report(self, sequences: list[Sequence]) -> None:
        if sequences:
            self._on_report(
                [
                    Report(
                        sequence=sequence,
                        output_ids=sequence.output_ids,
                        output_logprobs=sequence.output_logprobs,
                        version_spans=sequence.version_spans,
                        finish=sequence.finish,
                    )
                    for sequence in sequences
                ]
            )

    def _fail_commands(self) -> None:
        while True:
            try:
                entry = self._commands.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                entry[1].set_exception(
                    EngineError(f"the engine has stopped: {self._failure or 'shutting down'}")
                )
