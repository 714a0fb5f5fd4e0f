"""Attention of a micro-batch whose rows are divided over the ranks of a context group (Ulysses, arXiv
2309.14509).

    rows of this rank, all heads  -- all-to-all -->  all rows, this rank's heads
      -> attention over the whole micro-batch  -- all-to-all -->  rows of this rank, all heads

So the layouts of packed sequences, shared prefixes and windows are those of one rank. A rank gets consecutive
query heads and the KV heads that belong to them, so the number of KV heads limits the number of ranks.

Left out: a ring of keys and values, which has no such limit. It needs a layout of its own for every pair of
ranks.

Shape suffixes: N ranks, U rows of the micro-batch, R rows of a rank, H heads, D head size, X heads of a rank
times their size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from areal_like.errors import ConfigError
from trainer.distributed.context import ContextGroup


class ContextExchange:
    """The exchange of one micro-batch's attention. Every method is collective in the group."""

    def __init__(self, group: ContextGroup, *, num_rows: int) -> None:
        """`num_rows`: U."""
        self._group = group
        self._num_rows = num_rows

    def to_heads(self, *rows: Tensor) -> list[Tensor]:
        """[U, H / N, D] of each [R, H, D]; heads and sizes may differ. Raises ConfigError if N does not
        divide the heads."""
        size = self._group.size
        for each_RHD in rows:
            if each_RHD.shape[1] % size:
                raise ConfigError(
                    f"trainer.context_parallel={size} does not divide {each_RHD.shape[1]} heads of this "
                    "model's attention: lower it"
                )
        parts_RNX = [each_RHD.reshape(len(each_RHD), size, -1) for each_RHD in rows]
        if len({part.dtype for part in parts_RNX}) == 1:
            sizes = [part.shape[2] for part in parts_RNX]
            gathered = torch.split(self._all_rows(torch.cat(parts_RNX, dim=2)), sizes, dim=1)
        else:
            gathered = tuple(self._all_rows(part) for part in parts_RNX)
        return [
            part_UX.view(len(part_UX), -1, row.shape[2]) for part_UX, row in zip(gathered, rows, strict=True)
        ]

    def own_heads(self, num: int) -> slice:
        """This rank's heads of `num`, after `to_heads`."""
        own = num // self._group.size
        return slice(self._group.rank * own, (self._group.rank + 1) * own)

    def to_rows(self, out_UHD: Tensor) -> Tensor:
        """[R, H, D] of the [U, H / N, D] that attention has computed."""
        size, head_size = self._group.size, out_UHD.shape[2]
        padding = -len(out_UHD) % size
        out_UX = F.pad(out_UHD.flatten(1), (0, 0, 0, padding))
        out_RNX = out_UX.view(len(out_UX) // size, size, -1)
        out_NRX = self._group.all_to_all(out_RNX.transpose(0, 1))
        return out_NRX.transpose(0, 1).reshape(out_NRX.shape[1], -1, head_size)

    def _all_rows(self, part_RNX: Tensor) -> Tensor:
        """[U, X]: this rank's heads of all rows."""
        part_NRX = self._group.all_to_all(part_RNX.transpose(0, 1))
        # Row r of rank i is row r N + i of the micro-batch.
        return part_NRX.transpose(0, 1).flatten(0, 1)[: self._num_rows]
