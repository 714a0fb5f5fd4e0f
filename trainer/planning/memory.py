"""Compares the memory that a job needs on each trainer rank, engine GPU and host with the memory that
exists.

Of the trainer's hosts that of rank 0 is judged: it has everything that the others have, and the copies of
what is pushed.
"""

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
_COMPARED_BUCKETS = 3.5
"""The same with `weights.delta=auto`, in addition: the base, and what the comparison computes."""
PROCESSES = "trainer processes"
SNAPSHOTS = "copies of what is pushed (senders)"
ROWS = "rows of a checkpoint that is being written"
ROUTES = "routes of two steps (trainer)"
KV_ROUTES = "routes of the tokens in KV caches"
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
    rank_host: dict[str, float]
    """What rank 0 has on its host."""
    host: dict[str, float]
    """The host of rank 0: all of its ranks and engines."""
    host_bytes: float
    """Memory of a host."""
    snapshots: int
    """Copies of what is pushed that rank 0 keeps."""
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
    def other_rank_host(self) -> float:
        """Bytes that a rank other than rank 0 has on its host."""
        return sum(self.rank_host.values()) - self.rank_host[SNAPSHOTS]

    @property
    def host_total(self) -> float:
        """Bytes of the host of rank 0."""
        return sum(self.host.values())

    @property
    def host_shortage(self) -> float:
        """Bytes that the host of rank 0 lacks."""
        return max(0.0, self.host_total - self.host_bytes)

    @property
    def shortage(self) -> float:
        """Shortage of the trainer, of the engine and of the host together."""
        return self.trainer_shortage + self.engine_shortage + self.host_shortage

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
        if self.host_shortage:
            found.append(
                f"the host of trainer rank 0 needs {gib(self.host_total)} of memory, and has "
                f"{gib(self.host_bytes)} (--host-memory)"
            )
        return found


def gib(num_bytes: float) -> str:
    """`12.3 GiB`"""
    return f"{num_bytes / GIB:.1f} GiB"


def plan_memory(job: PlannedJob) -> MemoryPlan:
    """The memory of the job on its GPUs."""
    placement, trace = job.placement, job.trace
    largest = trace.largest_tensor_bytes / 4 * job.param_bytes
    bucket = min(max(float(job.config.weights.bucket_bytes_on("cuda")), largest), job.pushed_bytes)
    engine = engine_memory(job, trainer_bytes=trace.resident + CONTEXT_BYTES if placement.is_shared else 0.0)
    weights = job.config.weights
    compared = 0.0 if weights.delta_with(job.config.rollout.engine) == "off" else _COMPARED_BUCKETS
    snapshots = weights.snapshots_on(job.config.trainer.device, num_bytes=job.pushed_bytes / weights.senders)
    rank_host = _of_rank_0(job, snapshots=snapshots)
    return MemoryPlan(
        trainer={
            **{name: float(size) for name, size in trace.peak_bytes.items()},
            "allocator (fragmentation)": FRAGMENTATION * trace.peak,
            "CUDA context, cuBLAS, NCCL": CONTEXT_BYTES,
            "push buckets (rank 0)": (_SENT_BUCKETS + compared) * bucket,
        },
        engine=engine,
        gpu_bytes=placement.gpu.memory_bytes,
        rank_host=rank_host,
        host=_host(job, engine, rank_host),
        host_bytes=placement.host_bytes,
        snapshots=snapshots,
        is_shared=placement.is_shared,
        context=job.lengths.context,
    )


def _of_rank_0(job: PlannedJob, *, snapshots: int) -> dict[str, float]:
    """What rank 0 has in host memory. The other ranks have the same, but only senders have copies of what is
    pushed."""
    trace, weights = job.trace, job.config.weights
    copies = snapshots + (weights.delta_with(job.config.rollout.engine) != "off")  # the last push
    return {
        PROCESSES: HOST_PROCESS_BYTES,
        SNAPSHOTS: copies * job.pushed_bytes / weights.senders,
        ROWS: 12.0 * trace.num_trained / trace.num_shards,
        **{name: float(size) for name, size in trace.on_host_bytes.items()},
        ROUTES: _FETCHED_STEPS * job.routes_bytes / trace.world_size,
    }


def _host(job: PlannedJob, engine: EngineMemory, rank: dict[str, float]) -> dict[str, float]:
    """The host of rank 0, which needs the most."""
    ranks = min(job.placement.trainer_gpus, GPUS_PER_HOST)
    engines = job.config.rollout.num_servers if job.placement.is_one_host else 0
    # Only the ranks of replica 0 write, and senders are among them.
    senders = sender_ranks(job.config.weights.senders, num_ranks=job.trace.num_shards)
    num_ranks = {
        SNAPSHOTS: sum(rank < ranks for rank in senders),
        ROWS: min(ranks, job.trace.num_shards),
    }
    found = {name: size * num_ranks.get(name, ranks) for name, size in rank.items()}
    found |= {
        "engine processes": engines * HOST_PROCESS_BYTES,
        KV_ROUTES: engines * _engine_routes(job, engine),
    }
    return {name: size for name, size in found.items() if size or name == SNAPSHOTS}


def _engine_routes(job: PlannedJob, engine: EngineMemory) -> float:
    """Routes (`model.router_replay`) that an engine keeps on its host."""
    if job.experts is None:
        return 0.0
    _, num_layers, routes = job.experts
    rollout = job.config.rollout
    if rollout.engine == "sglang":
        return engine.num_tokens * float(num_layers * routes.num_chosen * _SGLANG_CHOICE_BYTES)
    return float(rollout.max_running * job.lengths.context * routes.bytes_per_token)
