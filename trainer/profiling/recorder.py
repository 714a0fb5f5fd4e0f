"""Records the next steps of one rank with torch's profiler, when an operator asks for it.

    IDLE --ask()--> WAITING --all ranks are asked--> RECORDING --the last step ends--> WRITING --> IDLE
                       `---------close(): writes what there is------------------------^

Each step is a separate trace, which a thread writes while training continues: writing in the training thread
would keep the other ranks waiting in their next collective. The report, with time by named part of a step and
the operations that take the most time, is a JSON file next to the traces, so that a command without torch can
print it. It is written last, so when it exists, the traces exist too. If a profile fails (a full disk, a GPU
that another profiler uses), its report states this, and training continues.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from areal_like.errors import UserError
from areal_like.paths import write_json
from areal_like.runtime.daemon import Runtime
from trainer.distributed.ranks import Ranks
from trainer.profiling.ranges import PREFIX, record_ranges

log = logging.getLogger(__name__)

MAX_STEPS = 50
"""Most steps of one profile: each is a file of a few to a few hundred megabytes."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """Steps that one rank records."""

    id: str
    """The caller's name for the profile, 8 to 32 hexadecimal digits."""
    num_steps: int
    num_ranks: int = 1
    """Number of ranks that get this request: they start at the same step, the first after all of them have
    it."""
    with_shapes: bool = False
    with_memory: bool = False

    @property
    def vote(self) -> int:
        """A number above 0 that is equal on the ranks with this request."""
        return 1 + int(self.id[:15], 16)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> ProfileRequest:
        """Parses the body of the request. Raises UserError."""
        request_id, num_steps, num_ranks = body.get("id"), body.get("steps"), body.get("ranks", 1)
        if not isinstance(request_id, str) or not re.fullmatch(r"[0-9a-f]{8,32}", request_id):
            raise UserError("profile: id must be 8 to 32 hexadecimal digits")
        if type(num_steps) is not int or not 1 <= num_steps <= MAX_STEPS:
            raise UserError(f"profile: steps must be 1 to {MAX_STEPS}, not {str(num_steps)[:40]!r}")
        if type(num_ranks) is not int or not 1 <= num_ranks < 1 << 31:
            raise UserError("profile: ranks must be the number of ranks that are asked")
        flags = {name: body.get(name, False) for name in ("shapes", "memory")}
        if wrong := [name for name, value in flags.items() if not isinstance(value, bool)]:
            raise UserError(f"profile: {wrong[0]} must be true or false")
        return cls(
            id=request_id,
            num_steps=num_steps,
            num_ranks=num_ranks,
            with_shapes=flags["shapes"],
            with_memory=flags["memory"],
        )


TOP_OPERATIONS = 30
_S = 1e-6  # the profiler counts microseconds


@dataclass(kw_only=True)
class _Sum:
    calls: int = 0
    cpu_s: float = 0.0
    device_s: float = 0.0


@dataclass(kw_only=True)
class ProfileReport:
    """Sums over the recorded steps of one rank."""

    id: str
    rank: int
    device: str
    num_asked: int
    """Number of requested steps."""
    steps: list[int] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    """Names of the files, one for each step."""
    error: str = ""
    """Why fewer steps were recorded than requested."""
    _ranges: dict[str, _Sum] = field(default_factory=dict)
    _operations: dict[str, _Sum] = field(default_factory=dict)

    def add(self, step: int, *, trace: str, averages: Iterable[Any]) -> None:
        """Adds a step. `averages`: `key_averages()` of torch's profiler."""
        self.steps.append(step)
        self.traces.append(trace)
        for average in averages:
            is_range = average.key.startswith(PREFIX)
            sums = self._ranges if is_range else self._operations
            one = sums.setdefault(average.key.removeprefix(PREFIX), _Sum())
            one.calls += average.count
            one.cpu_s += _S * (average.cpu_time_total if is_range else average.self_cpu_time_total)
            one.device_s += _S * (average.device_time_total if is_range else average.self_device_time_total)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON. Times of parts include nested parts, times of operations do not include nested
        ones.

        `operations`: those that take the most time, on the device if there is one, else on the CPU.
        """
        has_device = any(one.device_s for one in self._operations.values())

        def rows(sums: dict[str, _Sum]) -> list[dict[str, Any]]:
            ordered = sorted(
                sums.items(), key=lambda item: -(item[1].device_s if has_device else item[1].cpu_s)
            )
            return [
                {"name": name, "calls": one.calls, "cpu_s": one.cpu_s, "device_s": one.device_s}
                for name, one in ordered
            ]

        return {
            "id": self.id,
            "rank": self.rank,
            "device": self.device,
            "num_asked": self.num_asked,
            "steps": self.steps,
            "traces": self.traces,
            "error": self.error,
            "ranges": rows(self._ranges),
            "operations": rows(self._operations)[:TOP_OPERATIONS],
        }


_CLOSE_S = 60.0
"""Longest time that the end of a trainer waits for its traces."""
_MEETING_S = 60.0
"""Longest time until the other ranks of a profile have the request; its caller may have ended."""


class StepRecorder:
    """`ask` and `status` are called in any thread, the others in the training thread."""

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        device: torch.device,
        waits: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """`directory`: for the traces; created with the first one. `waits`: shows a wait in /status."""
        self._waits = waits
        self._directory = directory
        self._rank = rank
        self._device = device
        self._lock = threading.Lock()
        self._request: ProfileRequest | None = None
        self._report: ProfileReport | None = None
        self._num_recorded = 0
        self._asked_s = 0.0
        self._is_recording = False
        self._is_open = True
        self._writer: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    @classmethod
    def of(cls, runtime: Runtime, ranks: Ranks) -> StepRecorder:
        """The recorder of a daemon's rank, which gets the control verb `profile`."""
        recorder = cls(runtime.paths.profiles, rank=ranks.rank, device=ranks.device, waits=runtime.waits)
        runtime.verbs["profile"] = recorder.on_verb
        return recorder

    def ask(self, request: ProfileRequest) -> None:
        """Requests a profile. Raises UserError while one is in progress."""
        with self._lock:
            if self._report is not None:
                raise UserError(
                    f"profile: rank {self._rank} is still recording another profile ({self._progress}): "
                    "ask again when it is done"
                )
            if not self._is_open:
                raise UserError("profile: the trainer is ending, and will not train another step")
            self._num_recorded, self._asked_s = 0, time.monotonic()
            self._report = ProfileReport(
                id=request.id, rank=self._rank, device=self._device.type, num_asked=request.num_steps
            )
            self._request = request  # last: `step` reads it without the lock

    async def on_verb(self, body: dict[str, Any]) -> dict[str, Any]:
        self.ask(ProfileRequest.of(body))
        return {"rank": self._rank}

    def status(self) -> dict[str, Any]:
        """For /status: empty without a profile."""
        with self._lock:
            return {} if self._report is None else {"id": self._report.id, "progress": self._progress}

    def meet(self, ranks: Ranks, *, stop: bool, shared: Sequence[int] = ()) -> tuple[bool, list[int]]:
        """Collective, before each step: recording begins once all ranks of a profile are asked.

        Returns True if `stop` is set on at least one rank, and rank 0's `shared` (as long on all ranks).
        """
        request = None if self._is_recording else self._request
        votes = ranks.stack(torch.tensor([int(stop), 0 if request is None else request.vote, *shared]))
        if request is not None:
            num_asked = int((votes[:, 1] == request.vote).sum())
            self._is_recording = num_asked == request.num_ranks
            if not self._is_recording and time.monotonic() > self._asked_s + _MEETING_S:
                self._end(f"{num_asked} of the {request.num_ranks} ranks were asked within {_MEETING_S:g} s")
        return bool(votes[:, 0].any()), votes[0, 2:].tolist()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A context manager around one step, which is recorded if a profile is requested."""
        request = self._request
        if request is None or not self._is_recording:
            yield
            return
        profiler = self._started(request)
        try:
            yield
        finally:
            record_ranges(False)
            if profiler is not None:
                self._stop(profiler, step, request)

    def close(self) -> None:
        """Writes the available part of an unfinished profile, in a limited time."""
        with self._lock:
            self._is_open = False
        if self._request is not None:
            self._end(f"the trainer ended after {self._num_recorded} of the steps")
        if self._last is not None:
            with self._waits("the traces of a profile to be written"), contextlib.suppress(TimeoutError):
                self._last.result(timeout=_CLOSE_S)
        if self._writer is not None:
            self._writer.shutdown(wait=False, cancel_futures=True)

    @property
    def _progress(self) -> str:
        assert self._report is not None
        if self._request is None:
            return "writing its traces"
        return f"{self._num_recorded} of {self._request.num_steps} steps recorded"

    def _started(self, request: ProfileRequest) -> profile | None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        try:
            profiler = profile(
                activities=activities,
                record_shapes=request.with_shapes,
                profile_memory=request.with_memory,
            )
            profiler.start()
        except RuntimeError as error:
            self._end(f"torch's profiler cannot start: {error}")
            return None
        record_ranges(True)
        return profiler

    def _stop(self, profiler: profile, step: int, request: ProfileRequest) -> None:
        try:
            profiler.stop()
        except RuntimeError as error:
            self._end(f"torch's profiler cannot stop: {error}")
            return
        self._num_recorded += 1
        self._submit(lambda: self._write(profiler, step))
        if self._num_recorded == request.num_steps:
            self._end("")

    def _end(self, error: str) -> None:
        """Ends the recording; the report is written after the traces."""
        self._request, self._is_recording = None, False
        self._submit(lambda: self._write_report(error))

    def _submit(self, work: Callable[[], None]) -> None:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="profile")
        self._last = self._writer.submit(work)

    def _write(self, profiler: profile, step: int) -> None:
        report = self._report
        assert report is not None
        name = f"trace-rank{self._rank}-step{step}.json.gz"
        partial = self._directory / f".partial-{name}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(self._directory / name)
            report.add(step, trace=name, averages=profiler.key_averages())
        except (OSError, RuntimeError) as error:
            report.error = report.error or f"the trace of step {step} cannot be written: {error}"
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _write_report(self, error: str) -> None:
        report = self._report
        assert report is not None
        report.error = report.error or error
        try:
            write_json(self._directory / report_name(report.id, rank=self._rank), report.to_json())
        except OSError as failure:
            log.warning("the report of a profile cannot be written: %s", failure)
        if report.error:
            log.warning("profile: %s", report.error)
        with self._lock:
            self._report = None


def report_name(profile_id: str, *, rank: int) -> str:
    return f"report-{profile_id}-rank{rank}.json"
