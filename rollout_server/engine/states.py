"""Recurrent states of linear-attention layers (Gated DeltaNet), one of each row, beside the row's KV.

Such a layer keeps a fixed amount of memory however long its sequence is: the last inputs of its convolution,
and one matrix per head that every token has changed (Yang et al., 2024, arXiv:2412.06464). The matrices are
float32 whatever the model's dtype is, because each step builds on the rounded result of the step before.

Unlike KV, a state has no positions: it stands for all tokens of its row, and cannot be cut to the state after
fewer of them. So states are copied and kept as a whole. A snapshot holds the bytes of one row, of all layers.

Shapes: L layers with states, S rows, R bytes of a row, C channels, W width of the convolution, H value heads,
K key size, V value size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes; the alignment of torch's own allocator."""


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """Sizes of one layer's state."""

    num_channels: int
    conv_width: int
    num_heads: int
    key_dim: int
    value_dim: int


class StateLayout:
    """Where the states of all layers are in the bytes of a row."""

    def __init__(self, shapes: Iterable[StateShape], *, dtype: torch.dtype) -> None:
        """`dtype`: of the model, in which the inputs of convolutions are kept."""
        self.parts: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        """(first byte, dtype, shape), alternately of a layer's convolution and of its matrices."""
        self.bytes_per_row = 0
        """R"""
        for shape in shapes:
            self._add(dtype, (shape.num_channels, shape.conv_width))
            self._add(torch.float32, (shape.num_heads, shape.key_dim, shape.value_dim))

    def _add(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.parts.append((self.bytes_per_row, dtype, shape))
        num_bytes = math.prod(shape) * dtype.itemsize
        self.bytes_per_row += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

    def zeros(self, num_rows: int, *, device: torch.device) -> StateRows:
        """The states before the first token."""
        storage_SR = torch.zeros(num_rows, self.bytes_per_row, dtype=torch.uint8, device=device)
        return StateRows(self, storage_SR)


class StateRows:
    """The states of S sequences. A forward pass reads and writes the views of each layer."""

    def __init__(self, layout: StateLayout, storage_SR: Tensor) -> None:
        """`storage_SR`: uint8; its rows may be apart in memory."""
        self._layout = layout
        self._storage_SR = storage_SR
        views = [
            storage_SR[:, start : start + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .view(len(storage_SR), *shape)
            for start, dtype, shape in layout.parts
        ]
        self.conv_SCW: Sequence[Tensor] = views[::2]
        """Per layer: the convolution's inputs at the last W positions, in the model's dtype; zeros before the
        first token."""
        self.matrices_SHKV: Sequence[Tensor] = views[1::2]
        """Per layer: float32."""

    @property
    def num_bytes(self) -> int:
        return self._storage_SR.numel()

    def first(self, num_rows: int) -> StateRows:
        """Views of rows 0..num_rows-1."""
        return StateRows(self._layout, self._storage_SR[:num_rows])

    def select(self, row_B: Tensor) -> StateRows:
        """Copies of rows `row_B` (int64)."""
        return StateRows(self._layout, self._storage_SR.index_select(0, row_B))

    def write(self, row_B: Tensor, states: StateRows) -> None:
        """Copies all rows of `states` to rows `row_B` (int64)."""
        self._storage_SR.index_copy_(0, row_B, states._storage_SR)

    def snapshot(self, row: int) -> Tensor:
        """A copy of one row: uint8[R]."""
        return self._storage_SR[row].clone()

    def restore(self, row: int, snapshot_R: Tensor) -> None:
        """Writes a snapshot into a row."""
        self._storage_SR[row] = snapshot_R

    def clear(self, row: int) -> None:
        """Sets a row to the state before the first token."""
        self._storage_SR[row].zero_()
