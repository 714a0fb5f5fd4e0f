"""Does the job fit: the memory of each trainer rank, each engine GPU and each host, against what there is."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config import Config
from trainer.planning.engines import BYTES, EngineMemory, engine_memory, engine_options
from trainer.planning.gpus import GIB, GPUS_PER_HOST, Placement
from trainer.planning.lengths import Lengths
from trainer.planning.shapes import ModelShape
from trainer.planning.trace import StepTrace

CONTEXT_BYTES = 1.5 * GIB
"""Assumed on each trainer GPU: CUDA context, cuBLAS workspaces, NCCL's buffers."""
FRAGMENTATION = 0.05
"""Assumed: memory that torch's allocator holds beyond what tensors use, as a share of it (with
expandable segments)."""
HOST_PROCESS_BYTES = 4 * GIB
"""Assumed for one trainer rank or engine process: Python, torch and CUDA's host memory."""
_PUSH_COPIES = 2
"""Copies of a rank's rows that pushes hold on the host: the one that is sent, and the newest."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, and the verdict."""

    trainer: dict[str, float]
    """One rank's GPU (with `trainer.device=cpu`: its part of the host)."""
    engine: EngineMemory
    gpu_bytes: float
    """Of one GPU."""
    host: dict[str, float]
    """One host with up to eight GPUs."""
    is_shared: bool
    context: int

    @property
    def trainer_total(self) -> float:
        """Bytes of one rank."""
        return sum(self.trainer.values())

    @property
    def trainer_room(self) -> float:
        """Bytes of a GPU that a trainer rank may take."""
        return self.gpu_bytes - (self.engine.total if self.is_shared else 0.0)

    @property
    def trainer_shortage(self) -> float:
        """Bytes that a rank's GPU lacks."""
        return max(0.0, self.trainer_total - self.trainer_room)

    @property
    def engine_shortage(self) -> float:
        """Bytes that an engine's GPU lacks for weights and one sequence of the longest context."""
        sequence = self.context * self.engine.kv_per_token
        too_large = 0.0 if self.is_shared else max(0.0, self.engine.total - self.gpu_bytes)
        return max(0.0, sequence - self.engine.kv_at_least, too_large)

    @property
    def shortage(self) -> float:
        """Both together."""
        return self.trainer_shortage + self.engine_shortage

    @property
    def problems(self) -> list[str]:
        """Why the job does not fit; empty if it does."""
        found = []
        if self.trainer_shortage:
            beside = " beside the engine" if self.is_shared else ""
            found.append(
                f"a trainer rank needs {gib(self.trainer_total)}, and a GPU has {gib(self.trainer_room)}{beside}"
            )
        if self.engine.kv_at_least <= 0:
            found.append(
                f"an engine's weights need {gib(self.engine.weights)} of each GPU: no KV cache is left"
            )
        elif self.engine.num_tokens < self.context:
            found.append(
                f"an engine's KV cache holds {self.engine.num_tokens} tokens, and one sequence may have "
                f"{self.context}"
            )
        if not self.is_shared and self.engine.total > self.gpu_bytes:
            found.append(
                f"an engine needs {gib(self.engine.total)} of each GPU, which has {gib(self.gpu_bytes)}"
            )
        return found


def gib(num_bytes: float) -> str:
    """`12.3 GiB`"""
    return f"{num_bytes / GIB:.1f} GiB"


def plan_memory(
    config: Config, shape: ModelShape, lengths: Lengths, placement: Placement, trace: StepTrace
) -> MemoryPlan:
    """The memory of the job on these GPUs."""
    gpu_bytes = placement.gpu.memory_bytes
    tensors = float(trace.peak)
    trainer: dict[str, float] = {name: float(size) for name, size in trace.peak_bytes.items()}
    trainer["allocator (fragmentation)"] = FRAGMENTATION * tensors
    trainer["CUDA context, cuBLAS, NCCL"] = CONTEXT_BYTES
    engine = engine_memory(
        config,
        shape,
        lengths,
        num_params=trace.num_params,
        gpu_bytes=gpu_bytes,
        beside_bytes=trace.resident + CONTEXT_BYTES if placement.is_shared else 0.0,
    )
    return MemoryPlan(
        trainer=trainer,
        engine=engine,
        gpu_bytes=gpu_bytes,
        host=_host(config, placement, trace),
        is_shared=placement.is_shared,
        context=lengths.context,
    )


def _host(config: Config, placement: Placement, trace: StepTrace) -> dict[str, float]:
    """Of the host with the most trainer ranks."""
    ranks = min(placement.trainer_gpus, GPUS_PER_HOST)
    share = trace.num_params / trace.world_size
    parallel = engine_options(config).tensor_parallel
    local_engines = 0
    if placement.is_one_host:
        local_engines = placement.engine_gpus
    wire = trace.num_params * BYTES[str(config.model.dtype)]
    bucket = max(
        float(config.weights.bucket_bytes_on("cuda")), trace.largest_param_bytes / 4 * BYTES[str(config.model.dtype)]
    )
    return {
        "trainer processes": ranks * HOST_PROCESS_BYTES,
        "rows for pushes (two copies)": _PUSH_COPIES * wire * ranks / trace.world_size,
        "buckets of rank 0": 5 * bucket,
        "rows of a checkpoint being written": 12 * share * ranks,
        "engine processes": local_engines * HOST_PROCESS_BYTES,
        "engines' loading of weights": wire / parallel if local_engines else 0.0,
    }
