"""The engine's thread: steps the core while sequences can run, and executes commands between two steps.

The thread owns the EngineCore. All other code in the process reaches the core through `EngineLoop.call`, so
the core needs no locks and a command never sees a half-done step. Output leaves the thread as immutable
snapshots, because a running sequence changes with the next step. While steps take less than a few
milliseconds, the outputs of several are passed on together: each time wakes the thread that writes responses,
and both threads share Python's lock. The thread also measures time: *idle* is time with no runnable sequence
(no sequence at all, or paused), *busy* is time inside steps.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.cpus import core_times
from areal_like.errors import EngineError, WeightSyncError
from areal_like.runtime.freed_memory import FreedMemory, resident_bytes, return_freed_memory
from areal_like.runtime.threads import NamedThread
from rollout_server.engine.core import EngineCore, Running
from rollout_server.engine.models.base import Weights
from rollout_server.engine.scheduler import Finish, Sequence
from rollout_server.engine.threads import ThreadCount

logger = logging.getLogger(__name__)

T = TypeVar("T")
_REPORT_EVERY_S = 0.004
"""Minimum time between two reports of outputs while sequences run and no command arrives."""
_LOOK_AT_MEMORY_EVERY_S = 10.0
"""A return of freed memory takes up to a quarter of a second."""


@dataclass(frozen=True, kw_only=True)
class SequenceOutput:
    """A snapshot of a sequence's output."""

    sequence: Sequence
    output_ids: list[int]
    output_logprobs: list[float]
    version_spans: list[tuple[str, int, int]]
    """(version, start, end) over the output: the weight version that sampled these tokens."""
    finish: Finish | None
    """None while the sequence is waiting or running."""
    routes_TLK: NDArray[Any] | None = None
    """Of a sequence that has ended: see `Sequence`."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Counters and gauges of the engine. The field names are the keys of `load` in /server_info."""

    running: int
    """Sequences that hold a row."""
    waiting: int
    rows: int
    """All rows, held or free."""
    paused: bool
    weight_version: str
    generated_tokens: int
    prefilled_tokens: int
    copied_tokens: int
    """Context tokens whose KV was copied instead of computed."""
    shared_prefixes: int
    """Sequences whose context was copied from another sequence instead of computed."""
    continued_prefixes: int
    """Sequences that started with KV kept from an earlier turn of their conversation."""
    kept_tokens: int
    """Tokens whose KV is kept for the next turns of conversations."""
    kept_states: int
    """Recurrent states kept for them (models with linear attention)."""
    kv_bytes: int
    """Memory of the rows' keys and values."""
    state_bytes: int
    """Memory of the rows' recurrent states."""
    steps: int
    busy_s: float
    idle_s: float
    stall_s: float
    """Sum over weight swaps of the time from stopping to the next token."""
    threads: int
    """CPU threads of the forward pass now."""


class EngineLoop:
    """Runs an EngineCore in a daemon thread.

        CREATED -> start -> RUNNING -> stop -> STOPPED
                               \\-> the core raises: FAILED

    `on_output` is called in that thread with the output that a step or a command reports. If the core raises,
    `on_failure` is called once with the reason, and every later `call` fails with EngineError.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        threads: ThreadCount,
        on_output: Callable[[list[SequenceOutput]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """`threads`: CPU threads of the forward pass."""
        self._core = core
        self._threads = threads
        self._on_output = on_output
        self._on_failure = on_failure
        # None ends the thread.
        self._commands: queue.SimpleQueue[tuple[Callable[[EngineCore], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = NamedThread(self._main, name="engine")
        self._unreported: list[SequenceOutput] = []
        self._reported_s = 0.0
        """When outputs were last passed on."""
        self._failure = ""
        self._stopping = False
        self._idle_since_s: float | None = None
        self._idle_s = self._busy_s = self._stall_s = 0.0
        self._is_on_cpu = core.model.facts.device.type == "cpu"
        self._freed, self._looked_s = FreedMemory(), time.perf_counter()
        self.on_first_token: Callable[[float], None] = lambda seconds: None
        """Called with the time from a sequence's request to its first token."""
        self.on_end: Callable[[float], None] = lambda seconds: None
        """Called with the time from a sequence's request to its end."""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> None:
        """Stops the thread after the current step."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """True while the thread runs steps and commands."""
        return self._thread.is_alive() and not self._failure

    def call(self, command: Callable[[EngineCore], T]) -> Future[T]:
        """Runs `command` between two steps. The future gets its result or its exception.

        A ValueError, EngineError or WeightSyncError that a command raises goes to its caller only; any other
        exception also ends the loop.
        """
        future: Future[T] = Future()
        if not self.alive:
            future.set_exception(self._stopped_error())
        else:
            self._commands.put((command, future))
        return future

    def abort(self, choose: Callable[[EngineCore], Iterable[Sequence]]) -> Future[None]:
        """Ends the sequences that `choose` returns, with the tokens they have, and reports their output."""

        def command(core: EngineCore) -> None:
            self._collect(core.abort(list(choose(core))))
            self._report()

        return self.call(command)

    def swap_weights(self, weights: Weights, *, version: str, recompute: bool) -> Future[float]:
        """Activates weights between two steps.

        The future's result is the stall: seconds from stopping to the next token, KV recomputation included.
        """

        def activate(core: EngineCore) -> None:
            core.swap_weights(weights, version=version, recompute=recompute)

        return self._activate(activate)

    def activate_adapter(
        self, tensors: Mapping[str, Tensor], *, version: str, running: Running
    ) -> Future[float]:
        """Activates an adapter between two steps; the future's result is that of `swap_weights`."""

        def activate(core: EngineCore) -> None:
            aborted = core.activate_adapter(tensors, version=version, running=running)
            if aborted:
                logger.warning("adapter %s: %d sequences of the oldest are aborted", version, len(aborted))
            self._collect(aborted)

        return self._activate(activate)

    def _activate(self, activate: Callable[[EngineCore], None]) -> Future[float]:
        def command(core: EngineCore) -> float:
            started_s = time.perf_counter()
            activate(core)
            self._step()
            stall_s = time.perf_counter() - started_s
            self._stall_s += stall_s
            return stall_s

        return self.call(command)

    def load(self) -> Load:
        """The current load. It is read without a lock, so its numbers may come from two adjacent steps."""
        core, idle_since_s = self._core, self._idle_since_s
        current_idle_s = 0.0 if idle_since_s is None else time.perf_counter() - idle_since_s
        return Load(
            running=core.scheduler.num_running,
            waiting=len(core.scheduler.waiting),
            rows=core.scheduler.num_rows,
            paused=core.scheduler.paused,
            weight_version=core.version,
            generated_tokens=core.num_generated,
            prefilled_tokens=core.contexts.num_prefilled,
            copied_tokens=core.contexts.num_copied,
            shared_prefixes=core.contexts.num_shared,
            continued_prefixes=core.contexts.num_continued,
            kept_tokens=core.contexts.kept.num_tokens,
            kept_states=core.contexts.kept.num_states,
            kv_bytes=core.kv_bytes,
            state_bytes=core.state_bytes,
            steps=core.num_steps,
            busy_s=self._busy_s,
            idle_s=self._idle_s + current_idle_s,
            stall_s=self._stall_s,
            threads=self._threads.count,
        )

    def _main(self) -> None:
        torch.set_num_threads(self._threads.count)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    self._return_freed_memory(time.perf_counter())
                    self._step()
                self._report()
        # The outermost frame of the thread: an uncaught exception would leave all requests waiting forever.
        except Exception as error:
            logger.exception("the engine failed")
            self._report()
            self._failure = f"{type(error).__name__}: {error}"
            self._on_failure(self._failure)
        self._fail_commands()

    def _run_commands(self) -> None:
        """Runs all queued commands; waits for one while no sequence is runnable."""
        while True:
            wait = not self._core.scheduler.runnable
            if wait:
                self._report()
            try:
                entry = self._commands.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                self._idle_since_s = time.perf_counter()
                entry = self._commands.get()
                self._idle_s += time.perf_counter() - self._idle_since_s
                self._idle_since_s = None
            # The caller must not see a command's result before the outputs of the steps that preceded it.
            self._report()
            if entry is None:
                self._stopping = True
                return
            command, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command(self._core))
            except (ValueError, EngineError, WeightSyncError) as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                raise

    def _step(self) -> None:
        if not self._core.scheduler.runnable:
            return
        self._take_idle_cores()
        started_s = time.perf_counter()
        self._collect(self._core.step())
        ended_s = time.perf_counter()
        self._busy_s += ended_s - started_s
        for sequence in self._core.begun:
            self.on_first_token(ended_s - sequence.made_s)
        if ended_s - self._reported_s >= _REPORT_EVERY_S:
            self._report()

    def _take_idle_cores(self) -> None:
        if self._threads.is_due(time.monotonic()):
            before, now = self._threads.count, self._threads.look(core_times())
            if now != before:
                torch.set_num_threads(now)

    def _return_freed_memory(self, now_s: float) -> None:
        if self._is_on_cpu and now_s - self._looked_s >= _LOOK_AT_MEMORY_EVERY_S:
            self._looked_s = now_s
            if self._freed.is_due(resident_bytes()):
                return_freed_memory()

    def _collect(self, sequences: list[Sequence]) -> None:
        now_s = time.perf_counter()
        for sequence in sequences:
            if sequence.finish is not None:
                self.on_end(now_s - sequence.made_s)
        self._unreported += [
            SequenceOutput(
                sequence=sequence,
                output_ids=sequence.output_ids,
                output_logprobs=sequence.output_logprobs,
                version_spans=sequence.version_spans,
                finish=sequence.finish,
                routes_TLK=None if sequence.finish is None else sequence.routes_TLK,
            )
            for sequence in sequences
        ]

    def _report(self) -> None:
        """Passes on the collected outputs."""
        if self._unreported:
            outputs, self._unreported = self._unreported, []
            self._on_output(outputs)
            self._reported_s = time.perf_counter()

    def _fail_commands(self) -> None:
        while True:
            try:
                entry = self._commands.get_nowait()
            except queue.Empty:
                return
            if entry is not None:
                entry[1].set_exception(self._stopped_error())

    def _stopped_error(self) -> EngineError:
        return EngineError(f"the engine has stopped: {self._failure or 'shutting down'}")
