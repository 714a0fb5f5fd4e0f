"""Speed and memory of a step: seconds by phase, tokens and model FLOPs per second, MFU, memory of all ranks.

On a CPU the clock is the host's. A GPU runs kernels asynchronously, so there a phase lasts from one event in
the stream to another. These times are read at the end of the step, because reading them earlier would stall
the GPU. Then the ranks exchange one short vector. Memory: on a GPU the allocator's peak since the last step,
on a CPU the largest memory that the process has had. There freed memory is returned when a step begins
(`areal_like/runtime/freed_memory.py`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from areal_like.gpus import peak_flops
from areal_like.runtime.freed_memory import FreedMemory, resident_bytes, return_freed_memory
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import RankPhase, Ranks
from trainer.metrics.model_flops import ModelFlops
from trainer.models.packed_model import PackedModel
from trainer.profiling.ranges import named_range

T = TypeVar("T")


class Clock:
    """Marks points in time, and later gives the seconds between them; this class by the time of the host."""

    def mark(self) -> Any:
        """Returns a mark of the current time. Must not block."""
        return time.perf_counter()

    def seconds(self, spans: Iterable[tuple[Any, Any]]) -> list[float]:
        """The seconds from the first to the second mark of each pair. May block."""
        return [end - start for start, end in spans]


class CudaClock(Clock):
    """Time of a GPU's current stream: a mark is an event that is reached after the work queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, spans: Iterable[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.current_stream(self._device).synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in spans]


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock()


class PhaseTimer:
    """Adds up time by phase, from its creation on."""

    def __init__(
        self, phases: Iterable[str], *, place: RankPhase | None = None, clock: Clock | None = None
    ) -> None:
        """`phases`: all names; a phase in which no time was spent is reported as 0. `place`: gets the
        current phase.

        `clock`: measures the phases; None: the host's clock.
        """
        self._place = place or RankPhase()
        self._clock = clock or Clock()
        self._start = time.perf_counter()
        self._spans: dict[str, list[tuple[Any, Any]]] = {phase: [] for phase in phases}

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Counts the time of a block."""
        name, spans = phase.removesuffix("_s"), self._spans[phase]
        start, outer = self._clock.mark(), self._place.phase
        self._place.enter(name)
        try:
            with named_range(name):
                yield
        finally:
            spans.append((start, self._clock.mark()))
        self._place.enter(outer)  # not after an error, whose message names the phase

    def timed(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Counts the time that an iterator takes to produce its items."""
        iterator = iter(items)
        while True:
            with self.span(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and `step_s` since the creation, by the host's clock.

        It synchronizes with a GPU: call it at the end of a step.
        """
        spent = {phase: sum(self._clock.seconds(spans)) for phase, spans in self._spans.items()}
        return {**spent, "step_s": time.perf_counter() - self._start}


PHASES = ("wait_s", "compute_s", "reduce_s", "update_s")
_GB = 1e9


class StepSpeed:
    """One for the life of the trainer. Each step: begin() -> flops_of() per micro-batch -> metrics()."""

    def __init__(
        self,
        policy: PackedModel,
        ranks: Ranks,
        *,
        others: Sequence[PackedModel] = (),
        one_of: Sequence[PackedModel] = (),
        peak_tflops: float = 0.0,
    ) -> None:
        """`others`: models that run forward in addition to each pass of the policy. `one_of`: models of which
        one, in addition, runs on each sequence; their mean is counted.

        `peak_tflops`: peak of one rank's device; 0: looked up by its name, and unknown on a CPU.
        """
        self._ranks = ranks
        self._policy = ModelFlops.of(policy.model)
        self._others = [(1.0, ModelFlops.of(each.model)) for each in others]
        self._others += [(1 / len(one_of), ModelFlops.of(each.model)) for each in one_of]
        device = ranks.device
        known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = peak_tflops * 1e12 or known
        self._freed = FreedMemory()

    def begin(self, step: int) -> PhaseTimer:
        """Starts the timer of the step after `step` completed steps.

        On a CPU the memory that earlier steps have freed is returned, if it has become much.
        """
        self._ranks.place.enter("lockstep", step=step)
        timer = PhaseTimer(PHASES, place=self._ranks.place, clock=clock_of(self._ranks.device))
        if self._ranks.device.type == "cpu" and self._freed.is_due(resident_bytes()):
            return_freed_memory()
        return timer

    def flops_of(self, batch: PackedBatch) -> float:
        """Model FLOPs of a pass over a micro-batch, including a backward if gradients are enabled."""
        policy = self._policy.of_step if torch.is_grad_enabled() else self._policy.of_forward
        own_lengths = None if batch.shared is None else batch.shared.own_lengths
        return sum(
            share * count(batch.lengths, num_targets=len(batch.sampled_S), own_lengths=own_lengths)
            for share, count in (
                (1.0, policy),
                *((share, model.of_forward) for share, model in self._others),
            )
        )

    def metrics(self, timer: PhaseTimer, *, num_tokens: float, flops: float) -> dict[str, float]:
        """The metrics of the step that just ended, and its seconds on this rank. Collective.

        `timer`: from `begin`. `num_tokens`, `flops`: over all ranks.
        """
        seconds = timer.seconds()
        local = [seconds[phase] for phase in PHASES] + list(_memory_peaks(self._ranks.device))
        table_RV = self._ranks.stack(torch.tensor(local, dtype=torch.float64)).numpy()
        world_size, step_s = self._ranks.world_size, max(seconds["step_s"], 1e-9)
        computing_s = max(float(table_RV[:, PHASES.index("compute_s")].sum()), 1e-9)
        found = seconds | {
            "tokens_per_s": num_tokens / step_s,
            "tokens_per_s_per_gpu": num_tokens / step_s / world_size,
            "compute_tokens_per_s_per_gpu": num_tokens / computing_s,
            "model_tflops_per_s": flops / step_s / 1e12,
        }
        if self._peak:
            found["mfu"] = flops / (step_s * world_size * self._peak)
            found["mfu_compute"] = flops / (computing_s * self._peak)
        for column, phase in enumerate(PHASES):
            found[f"{phase}_min"] = float(table_RV[:, column].min())
            found[f"{phase}_max"] = float(table_RV[:, column].max())
        found["memory_peak_gb"] = float(table_RV[:, -2].max()) / _GB
        if self._ranks.device.type == "cuda":
            found["memory_reserved_peak_gb"] = float(table_RV[:, -1].max()) / _GB
        return found


def _memory_peaks(device: torch.device) -> tuple[float, float]:
    """Peak bytes (allocated, reserved); on a GPU the peaks are reset."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peaks[0]), float(peaks[1])
    # Not from getrusage, whose peak can be that of the parent process.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    resident = 1024.0 * int(found[1]) if found else 0.0
    return resident, resident
