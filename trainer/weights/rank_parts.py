"""How the buckets of a push divide among the trainer's ranks, and the collective that makes them whole.

FSDP2 shards rows: of M ranks, rank r holds ceil(rows / M) rows of each parameter from r * ceil(rows / M) on.
A checkpoint's tensor that is a whole parameter is divided in the same way; one inside a row of a parameter
(an expert's matrix) lies wholly on one rank. A rank's part of a bucket is one flat buffer with its rows of
the bucket's tensors, in their order. Parts have different sizes: with padding to the largest, a bucket of
experts that are all on one rank would need M times its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from areal_like.weights.buckets import Bucket, TensorSpec, cut_buckets, spec_of, unflatten
from areal_like.weights.hf_layout import HfTensor, hf_tensors
from trainer.distributed.sharding import local
from trainer.models.sharded_weights import row_range

_ALIGN = 8
"""Every part ends at a multiple of this, so that parts one behind the other can be viewed in any dtype."""


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """One rank's part of one bucket."""

    specs: tuple[TensorSpec, ...]
    """The rows of each tensor that this rank holds; a tensor of which it holds none is left out."""
    starts: tuple[int, ...]
    """Index in dimension 0 of the whole tensor at which they begin."""

    @property
    def num_bytes(self) -> int:
        """Length of the part's buffer, a multiple of `_ALIGN`."""
        return -(-sum(spec.num_bytes for spec in self.specs) // _ALIGN) * _ALIGN

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of the part's uint8[num_bytes] buffer, one for each of `specs`, without copying."""
        if not self.specs:
            return []
        rows = Bucket(tensors=self.specs)
        return list(unflatten(rows, flat[: rows.num_bytes]).values())


@dataclass(frozen=True, kw_only=True)
class BucketParts:
    """One bucket and its part on each rank."""

    bucket: Bucket
    of_rank: tuple[RankPart, ...]

    @property
    def num_bytes(self) -> int:
        """Length of all parts, one behind the other."""
        return sum(part.num_bytes for part in self.of_rank)

    def assemble(self, parts: Tensor, into: Tensor) -> None:
        """Copies all ranks' parts, uint8[num_bytes] in rank order, to their places in the whole bucket.

        `into`: uint8[bucket.num_bytes].
        """
        tensors = unflatten(self.bucket, into)
        for part, flat in zip(self.of_rank, self._split(parts), strict=True):
            for spec, start, rows in zip(part.specs, part.starts, part.views(flat), strict=True):
                tensors[spec.name][start : start + len(rows)].copy_(rows)

    def begin_gather(self, part: Tensor, *, to_rank: int, group: Any) -> tuple[Tensor, Any]:
        """Starts sending every rank's part to rank `to_rank`. Collective.

        `part`: of this rank, uint8[its num_bytes], on a device that the group's backend takes. Returns all
        parts in rank order (empty on the other ranks), and the work to wait for.
        """
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        sizes = [each.num_bytes for each in self.of_rank] if rank == to_rank else [0] * world_size
        sent = [len(part) if other == to_rank else 0 for other in range(world_size)]
        parts = part.new_empty(sum(sizes))
        # torch has no gather of parts of different sizes. NCCL skips the empty ones.
        work = dist.all_to_all_single(parts, part, sizes, sent, group=group, async_op=True)
        return parts, work

    def _split(self, parts: Tensor) -> Sequence[Tensor]:
        return torch.split(parts, [part.num_bytes for part in self.of_rank])


class PushLayout:
    """The buckets of every push, and this rank's rows of them."""

    def __init__(
        self, model: nn.Module, *, rank: int, world_size: int, bucket_bytes: int, dtype: str
    ) -> None:
        """`model`: of transformers, sharded. `dtype`: of floating-point weights on the wire."""
        params = dict(model.named_parameters())
        tensors = {tensor.name: tensor for tensor in hf_tensors(model)}
        specs = [_spec_on_wire(tensor, params[tensor.param], dtype) for tensor in tensors.values()]
        num_rows = {name: param.shape[0] for name, param in params.items()}
        self.buckets = tuple(
            BucketParts(
                bucket=bucket,
                of_rank=tuple(
                    _part_of(bucket, tensors, num_rows, rank=each, world_size=world_size)
                    for each in range(world_size)
                ),
            )
            for bucket in cut_buckets(specs, bucket_bytes=bucket_bytes)
        )
        self.own = tuple(bucket.of_rank[rank] for bucket in self.buckets)
        """This rank's part of each bucket."""
        rows = {name: local(param.detach()) for name, param in params.items()}
        first = {
            name: row_range(param.shape, rank=rank, world_size=world_size)[0]
            for name, param in params.items()
        }

        def source(name: str) -> Tensor:
            tensor = tensors[name]
            found = tensor.part_in(rows[tensor.param], first_row=first[tensor.param])
            assert found is not None
            return found[0]

        self._sources = [[source(spec.name) for spec in part.specs] for part in self.own]
        """Views of the parameters, which share their memory."""

    def copy_own(self, index: int, into: Tensor) -> None:
        """Copies this rank's part of a bucket, cast to the dtypes on the wire. `into`: uint8[num_bytes]."""
        for view, rows in zip(self.own[index].views(into), self._sources[index], strict=True):
            view.copy_(rows)


def _part_of(
    bucket: Bucket, tensors: dict[str, HfTensor], num_rows: dict[str, int], *, rank: int, world_size: int
) -> RankPart:
    specs, starts = [], []
    for spec in bucket.tensors:
        tensor = tensors[spec.name]
        shape = torch.Size((num_rows[tensor.param],))
        there = tensor.rows_in(*row_range(shape, rank=rank, world_size=world_size))
        if there is not None:
            rows = (there[1] - there[0], *spec.shape[1:])
            specs.append(TensorSpec(name=spec.name, dtype=spec.dtype, shape=rows))
            starts.append(there[0])
    return RankPart(specs=tuple(specs), starts=tuple(starts))


def _spec_on_wire(tensor: HfTensor, param: Tensor, dtype: str) -> TensorSpec:
    own_dtype = spec_of(tensor.name, param).dtype
    return TensorSpec(
        name=tensor.name, dtype=dtype if param.is_floating_point() else own_dtype, shape=tensor.shape
    )
