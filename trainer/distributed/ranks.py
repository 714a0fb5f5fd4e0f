"""This rank of the trainer: its number, device and mesh, and the small control collectives of a step.

The caller creates the default process group (`gloo`, or `cpu:gloo,cuda:nccl` on GPUs). Parameters and
gradients travel over the backend of the device. The control messages (is there another micro-batch, counts,
metrics) are CPU tensors and travel over gloo, so that they never wait behind a kernel. They use a separate
process group because they need a longer timeout: a rank that has its data may wait long for a rank that is
still fetching, while no rank should be late in the collectives of a forward.

`RankPhase` is what a rank does at present, for its error messages, its log and /status.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from areal_like.errors import ArealError, ConfigError
from areal_like.weights.buckets import checksum
from trainer.distributed.context import ContextGroup
from trainer.distributed.replicas import Replicas

_ABANDONED = 2
"""Vote of a rank that abandons the step; 0: it has no micro-batch left, 1: it has one."""


class IncompleteStepError(ArealError):
    """A step's groups ended early, or some rank abandoned it; no update was made anywhere.

    Raised on every rank, at the same micro-batch.
    """


@dataclass(kw_only=True)
class RankPhase:
    """Written by the training thread; other threads only read it.

    When a block fails, its phase is kept, so that an error message can name it.
    """

    phase: str = "starting"
    """Phase of a step (`wait`, `compute`, `reduce`, `update`), or an activity between steps."""
    step: int = 0
    """Completed optimizer steps."""
    microbatch: int = 0
    """Number of micro-batches started in this step; 0 outside of the micro-batches."""
    since_s: float = field(default_factory=monotonic)
    """Start of the phase, monotonic clock."""

    entered_s: float = field(default_factory=monotonic)
    """Start of the phase; unlike `since_s`, a micro-batch does not change it."""
    on_leave: Callable[[str, int, float], None] = field(default=lambda phase, step, since_s: None)
    """Called with the phase that ends, its step and its start."""

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Starts a phase; with `step`, also sets the number of completed steps."""
        self.on_leave(self.phase, self.step, self.entered_s)
        if step is not None:
            self.step, self.microbatch = step, 0
        self.phase, self.since_s = phase, monotonic()
        self.entered_s = self.since_s

    def next_microbatch(self) -> None:
        """Begins the next micro-batch of the step."""
        self.microbatch += 1
        self.since_s = monotonic()

    def __str__(self) -> str:
        return f"step {self.step}, micro-batch {self.microbatch}, {self.phase}"


def share_of(num: int, *, rank: int, world_size: int, context_parallel: int = 1) -> range:
    """The numbers in 0..num-1 of the groups or rows that a rank trains on: number j belongs to data rank
    j mod (number of data ranks). Of a context group only the first rank has any."""
    if rank % context_parallel:
        return range(0)
    return range(rank // context_parallel, num, world_size // context_parallel)


class Ranks:
    """Every method is collective: all ranks call it in the same order.

    With `trainer.context_parallel` the ranks are a mesh of data ranks x ranks of a context group
    (`context.py`). The model is sharded over all of them, or with `trainer.replicas` over those of a replica
    (`replicas.py`). Neither depends on the other: a context group may be a part of a replica, or have ranks
    of several.
    """

    context: ContextGroup | None = None
    """The ranks that compute micro-batches together with this one; None: it is alone."""
    replicas: Replicas | None = None
    """The replicas of the model; None: there is one."""

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        control_timeout_s: float | None = None,
        context_parallel: int = 1,
        replicas: int = 1,
        collective_timeout_s: float | None = None,
    ) -> None:
        """Needs the default process group.

        `control_timeout_s`: time limit of a control collective; None: the default group's.
        `context_parallel`, `replicas`: the settings of these names. `collective_timeout_s`: time limit of a
        collective of a context group or of replicas; None: torch's. Raises ConfigError if the ranks cannot be
        divided in this way.
        """
        self.device = torch.device(device)
        self.place = RankPhase()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        for key, num in (("trainer.context_parallel", context_parallel), ("trainer.replicas", replicas)):
            if self.world_size % num:
                raise ConfigError(
                    f"{key}={num} does not divide the number of ranks, {self.world_size}: change "
                    f"trainer.world_size or {key}"
                )
        if replicas > 1:
            self.replicas = Replicas(replicas, device_type=self.device.type, timeout_s=collective_timeout_s)
            self.mesh = self.replicas.mesh["shard"]
        else:
            self.mesh = init_device_mesh(self.device.type, (self.world_size,))
        if context_parallel > 1:
            self.context = ContextGroup(context_parallel, timeout_s=collective_timeout_s)
        self._control: dist.ProcessGroup | None = None
        self._is_abandoned: Callable[[], bool] = lambda: False
        if control_timeout_s is not None and self.world_size > 1:
            timeout = timedelta(seconds=control_timeout_s)
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    @classmethod
    def alone(cls) -> Ranks:
        """One rank on the CPU, without torchrun and without a port, for benchmarks and tests.

        Creates the default process group if there is none.
        """
        if not dist.is_initialized():
            store = dist.HashStore()
            dist.init_process_group("gloo", timeout=timedelta(seconds=60), store=store, rank=0, world_size=1)
        return cls()

    @property
    def context_parallel(self) -> int:
        """Number of ranks of a context group; 1: every rank computes micro-batches of its own."""
        return 1 if self.context is None else self.context.size

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the model (`trainer.replicas`)."""
        return 1 if self.replicas is None else self.replicas.num

    @property
    def replica(self) -> int:
        """Number of this rank's replica. Replica 0 saves and pushes."""
        return 0 if self.replicas is None else self.replicas.number

    @property
    def num_shards(self) -> int:
        """Number of ranks over which the model is sharded: those of a replica."""
        return self.world_size // self.num_replicas

    @property
    def shard_rank(self) -> int:
        """Number of this rank in its replica, which determines its rows."""
        return self.rank % self.num_shards

    @property
    def num_data(self) -> int:
        """Number of data ranks: those that have samples."""
        return self.world_size // self.context_parallel

    @property
    def data_rank(self) -> int:
        """Number of this rank's data rank: its own, or that of its context group's first rank."""
        return self.rank // self.context_parallel

    @property
    def has_samples(self) -> bool:
        """True on a data rank."""
        return self.rank % self.context_parallel == 0

    def share_of(self, num: int) -> range:
        """This rank's numbers, see `share_of`."""
        return share_of(
            num, rank=self.rank, world_size=self.world_size, context_parallel=self.context_parallel
        )

    def meet(self) -> None:
        """Barrier: waits for every rank."""
        if self.world_size > 1:
            dist.barrier(self._control)

    def any(self, flag: bool) -> bool:
        """True if the flag is set on at least one rank."""
        return bool(self._max(int(flag)))

    def any_left(self, flag: bool) -> bool:
        """`any` between two micro-batches. Raises IncompleteStepError if a rank abandons the step."""
        vote = self._max(_ABANDONED if self._is_abandoned() else int(flag))
        if vote == _ABANDONED:
            raise IncompleteStepError(f"step {self.place.step} was abandoned in its computation")
        return bool(vote)

    @contextlib.contextmanager
    def abandonable(self, is_abandoned: Callable[[], bool]) -> Iterator[None]:
        """A context in which `any_left` asks every rank whether it abandons the step."""
        before, self._is_abandoned = self._is_abandoned, is_abandoned
        try:
            yield
        finally:
            self._is_abandoned = before

    def _max(self, vote: int) -> int:
        if self.world_size == 1:
            return vote
        votes = torch.tensor([vote])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._control)
        return int(votes)

    def agree(self, number: int) -> int:
        """Returns rank 0's number on every rank."""
        if self.world_size == 1:
            return number
        shared = torch.tensor([number])
        dist.broadcast(shared, src=0, group=self._control)
        return int(shared)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks of a CPU tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._control)
        return values

    def sum_of_shards(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks of one replica of a CPU tensor, in place: the same bits on every
        rank."""
        return self.sum(values if self.replica == 0 else values.zero_())

    def difference_of_replicas(self, rows: Iterable[Tensor]) -> str:
        """Which ranks hold other rows than the ranks of their number in replica 0, and that they do, for a
        message; empty if the replicas are equal, to the last bit. `rows`: this rank's, in the same order on
        all ranks."""
        if self.replicas is None:
            return ""
        own = 0
        for each in rows:
            own = zlib.crc32(checksum(each.contiguous().view(-1).view(torch.uint8)).to_bytes(4, "big"), own)
        sums_RS = self.stack(torch.tensor([own])).view(self.num_replicas, self.num_shards)
        others = (sums_RS != sums_RS[0]).flatten().nonzero()[:, 0].tolist()
        return f"ranks {', '.join(map(str, others))} hold other weights than replica 0" if others else ""

    def stack(self, vector: Tensor) -> Tensor:
        """[world size, length]: the CPU vectors of all ranks, of equal length, in rank order."""
        if self.world_size == 1:
            return vector[None]
        rows = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(rows, vector, group=self._control)
        return torch.stack(rows)

    def gather(self, vector: Tensor) -> Tensor:
        """Concatenates CPU vectors of any length, in rank order."""
        if self.world_size == 1:
            return vector
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(vector)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = vector.new_zeros(longest)
        padded[: len(vector)] = vector
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self._control)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def exchange(self, messages: Sequence[bytes], *, most_bytes: Sequence[int]) -> list[bytes]:
        """Sends message r to rank r; returns the message of every rank to this one, in rank order.

        `most_bytes`: largest size of each rank's message to this one. Raises ArealError if one is longer.
        """
        if self.world_size == 1:
            return list(messages)
        sizes = torch.tensor([len(message) for message in messages])
        received_sizes = torch.empty_like(sizes)
        dist.all_to_all_single(received_sizes, sizes, group=self._control)
        for rank, (size, most) in enumerate(zip(received_sizes.tolist(), most_bytes, strict=True)):
            if size > most:
                raise ArealError(
                    f"rank {rank} sends {size} bytes to rank {self.rank}: at most {most} expected"
                )
        received = torch.empty(int(received_sizes.sum()), dtype=torch.uint8)
        # A copy, because a tensor needs writable memory, and an array, because a message may have 0 bytes.
        sent = torch.from_numpy(np.frombuffer(b"".join(messages), dtype=np.uint8).copy())
        dist.all_to_all_single(received, sent, received_sizes.tolist(), sizes.tolist(), group=self._control)
        return [part.numpy().tobytes() for part in torch.split(received, received_sizes.tolist())]
