"""Compares the memory that a job needs on each trainer rank, engine GPU and host with the memory that
exists."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planning.engines import EngineMemory, engine_memory
from trainer.planning.gpus import GIB, GPUS_PER_HOST
from trainer.planning.trace import PlannedJob
from trainer.weights.shares import sender_ranks

CONTEXT_BYTES = 1.5 * GIB
"""Assumed on each trainer GPU: CUDA context, cuBLAS workspaces, NCCL's buffers."""
FRAGMENTATION = 0.05
"""Assumed: memory that torch's allocator holds beyond what tensors use, as a share of it (with
expandable segments)."""
HOST_PROCESS_BYTES = 4 * GIB
"""Assumed for one trainer rank or engine process: Python, torch and CUDA's host memory."""
_SENT_BUCKETS = 2
"""Buckets on rank 0's GPU during a push: the one that is sent, and the next."""
_SNAPSHOTS = 2
"""Copies of what is pushed, on the host: the one that is sent, and the newest."""
_FETCHED_STEPS = 2
"""Steps whose groups a rank may hold: the one in training, and the next."""
_SGLANG_CHOICE_BYTES = 4
"""SGLang keeps an expert as int32, for all layers and every token of its KV cache."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by part, and the verdict."""

    trainer: dict[str, float]
    """One rank's GPU (with `trainer.device=cpu`: its part of the host)."""
    engine: EngineMemory
    gpu_bytes: float
    """Memory of one GPU."""
    host: dict[str, float]
    """The host of rank 0."""
    is_shared: bool
    context: int

    @property
    def trainer_total(self) -> float:
        """Bytes of one rank."""
        return sum(self.trainer.values())

    @property
    def trainer_room(self) -> float:
        """Bytes of a GPU that a trainer rank may use."""
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
        """Shortage of the trainer and of the engine together."""
        return self.trainer_shortage + self.engine_shortage

    @property
    def problems(self) -> list[str]:
        """Why the job does not fit; empty if it does."""
        found = []
        if self.trainer_shortage:
            next_to = " next to the engine" if self.is_shared else ""
            needed, room = gib(self.trainer_total), gib(self.trainer_room)
            found.append(f"a trainer rank needs {needed}, and a GPU has {room}{next_to}")
        if self.engine.kv_at_least <= 0:
            weights = gib(self.engine.weights + self.engine.encoders)
            found.append(f"an engine's weights need {weights} of each GPU: no room is left for KV")
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


def plan_memory(job: PlannedJob) -> MemoryPlan:
    """The memory of the job on its GPUs."""
    placement, trace = job.placement, job.trace
    largest = trace.largest_param_bytes / 4 * job.param_bytes
    bucket = min(max(float(job.config.weights.bucket_bytes_on("cuda")), largest), job.pushed_bytes)
    engine = engine_memory(job, trainer_bytes=trace.resident + CONTEXT_BYTES if placement.is_shared else 0.0)
    return MemoryPlan(
        trainer={
            **{name: float(size) for name, size in trace.peak_bytes.items()},
            "allocator (fragmentation)": FRAGMENTATION * trace.peak,
            "CUDA context, cuBLAS, NCCL": CONTEXT_BYTES,
            "push buckets (rank 0)": _SENT_BUCKETS * bucket,
        },
        engine=engine,
        gpu_bytes=placement.gpu.memory_bytes,
        host=_host(job, engine),
        is_shared=placement.is_shared,
        context=job.lengths.context,
    )


def _host(job: PlannedJob, engine: EngineMemory) -> dict[str, float]:
    """The host memory of rank 0, which needs the most."""
    ranks = min(job.placement.trainer_gpus, GPUS_PER_HOST)
    engines = job.config.rollout.num_servers if job.placement.is_one_host else 0
    senders = sender_ranks(job.config.weights.senders, world_size=job.trace.world_size)
    share = sum(rank < ranks for rank in senders) / len(senders)
    rows = 12.0 * job.trace.num_trained * ranks / job.trace.world_size
    return {
        "trainer processes": ranks * HOST_PROCESS_BYTES,
        "snapshots for pushes (two, on rank 0)": _SNAPSHOTS * job.pushed_bytes * share,
        "rows of a checkpoint that is being written": rows,
        "engine processes": engines * HOST_PROCESS_BYTES,
        **_host_routes(job, engine, ranks=ranks, engines=engines),
    }


def _host_routes(job: PlannedJob, engine: EngineMemory, *, ranks: int, engines: int) -> dict[str, float]:
    """What routes (`model.router_replay`) take on the host of rank 0."""
    if job.experts is None:
        return {}
    _, num_layers, routes = job.experts
    rollout = job.config.rollout
    if rollout.engine == "sglang":
        per_engine = engine.num_tokens * float(num_layers * routes.num_chosen * _SGLANG_CHOICE_BYTES)
    else:
        per_engine = float(rollout.max_running * job.lengths.context * routes.bytes_per_token)
    return {
        "routes of two steps (trainer)": _FETCHED_STEPS * job.routes_bytes * ranks / job.trace.world_size,
        "routes of the tokens in KV caches": engines * per_engine,
    }
