"""The ranks as replicas of the model (HSDP, `trainer.replicas`), each with all weights in shards.

Of M ranks, R replicas have M / R neighboring ranks each. FSDP2 shards over the ranks of a replica: it gathers
weights and adds up gradients among them only, in every micro-batch. `add_up` sums the accumulated gradients
over the replicas, once a step; the update is then the same in each.

    micro-batch: gather, reduce-scatter within a replica    step: add_up -> norm -> AdamW -> compare

FSDP2's own HSDP (`fully_shard` with the mesh of two dimensions) was left out: it reduces over the replicas in
every micro-batch, unless it is told before a backward that another one follows, and a rank does not know that
while groups arrive. The sum of a step overlaps with nothing, but it is sent once.

All replicas compute the same update from the same sum, so nothing brings them together again if they differ:
by a file that differs from machine to machine, a broken GPU, or machines of different kinds. So checksums of
their rows are compared when they have been read, and after every update, before it is pushed or saved
(`Ranks.difference_of_replicas`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Replicas:
    """The replicas of the default process group. Every method is collective in all ranks."""

    def __init__(self, num: int, *, device_type: str, timeout_s: float | None = None) -> None:
        """`num` divides the number of ranks. `timeout_s`: time limit of a collective; None: torch's."""
        world_size, world_rank = dist.get_world_size(), dist.get_rank()
        ranks_RS = torch.arange(world_size).view(num, -1)
        self.num = num
        self.number = world_rank // ranks_RS.shape[1]
        """This rank's replica; replica 0 saves and pushes."""
        # torch would not take the limit of the default group.
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        shards = [dist.new_group(ranks, timeout=timeout) for ranks in ranks_RS.tolist()]
        same_rows = [dist.new_group(ranks, timeout=timeout) for ranks in ranks_RS.T.tolist()]
        self._same_rows = same_rows[world_rank % ranks_RS.shape[1]]
        groups = [self._same_rows, shards[self.number]]
        names = ("replicate", "shard")
        self.mesh = DeviceMesh.from_group(groups, device_type, ranks_RS, mesh_dim_names=names)
        """Replicas x ranks of a replica."""

    def add_up(self, gradients: Sequence[Tensor]) -> None:
        """Sums each tensor over the ranks that hold the same rows, in place."""
        for work in [
            dist.all_reduce(gradient, group=self._same_rows, async_op=True)
            for gradient in gradients
            if gradient.numel()
        ]:
            assert work is not None
            work.wait()
