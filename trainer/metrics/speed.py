"""Speed and memory of a step: tokens and model FLOPs per second, MFU, phases and memory over all ranks.

The ranks exchange one short vector at the end of a step. Memory: on a GPU the allocator's peak since the last
step, on a CPU the largest memory that the process has had.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from areal_like.gpus import peak_flops
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.metrics.model_flops import FORWARD, FORWARD_AND_BACKWARD, ModelFlops
from trainer.metrics.phase_timer import PhaseTimer, clock_of
from trainer.models.packed_model import PackedModel

PHASES = ("wait_s", "compute_s", "reduce_s", "update_s")
_GB = 1e9


class StepSpeed:
    """One for the life of the trainer. Each step: begin() -> flops_of() per micro-batch -> metrics()."""

    def __init__(
        self,
        policy: PackedModel,
        ranks: Ranks,
        *,
        reference: PackedModel | None = None,
        proximal: PackedModel | None = None,
        peak_tflops: float = 0.0,
    ) -> None:
        """`reference`, `proximal`: models that run forward in addition to each pass of the policy.

        `peak_tflops`: peak of one rank's device; 0: looked up by its name, and unknown on a CPU.
        """
        self._ranks = ranks
        self._policy = ModelFlops.of(policy.model)
        self._others = [ModelFlops.of(each.model) for each in (reference, proximal) if each is not None]
        device = ranks.device
        known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = peak_tflops * 1e12 or known

    def begin(self, step: int) -> PhaseTimer:
        """Starts the timer of the step after `step` completed steps."""
        self._ranks.place.enter("lockstep", step=step)
        return PhaseTimer(PHASES, place=self._ranks.place, clock=clock_of(self._ranks.device))

    def flops_of(self, batch: PackedBatch) -> float:
        """Model FLOPs of a pass over a micro-batch, including a backward if gradients are enabled."""
        passes = FORWARD_AND_BACKWARD if torch.is_grad_enabled() else FORWARD
        own_lengths = None if batch.shared is None else batch.shared.own_lengths
        return sum(
            times * model.of_forward(batch.lengths, num_targets=len(batch.sampled_S), own_lengths=own_lengths)
            for model, times in ((self._policy, passes), *((model, FORWARD) for model in self._others))
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
