"""LoRA adapters of several versions over one base model, chosen for each row of a forward pass.

A slot holds one version. The slots of a matrix are blocks of one A and one B, so a pass over rows of several
versions is the same two products as over one: x A' for the slots up to the last one in use, every row's
foreign slots set to 0, and that times B'. Matrices that the model fuses (q, k, v) share their products too,
with blocks of zeros in B. There is no gather and no loop over versions.

Left out: adapters of different ranks at the same time. All versions of a run have one header.

Shapes: S slots, P adapted layers of a fused matrix, r rank, N rows, C inputs, O outputs of the fused matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.adapters import AdapterHeader, a_name, adapter_shapes, b_name

NO_SLOT = -1
"""Slot of rows that the base model computes without an adapter."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fused:
    """The adapters of one matrix of the model, which may hold several layers."""

    layers: tuple[tuple[str, int, int], ...]
    """Adapted layers: (name, first output, end of its outputs in the fused matrix)."""
    down_SRC: Tensor
    """[S, P r, C]: the A of each slot, layer after layer."""
    up_SRO: Tensor
    """[S, P r, O]: the B of each slot, transposed, with zeros outside a layer's own outputs."""


class AdapterSlots:
    """Adapters of up to `num_slots` versions. Belongs to one model; only the engine's thread uses it.

    A pass is preceded by `select` or `select_one`.
    """

    def __init__(
        self,
        header: AdapterHeader,
        matrices: Sequence[tuple[str, ...]],
        layers: Mapping[str, tuple[int, int]],
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`matrices`: for each matrix that the model multiplies with, the layers fused into it, in order.
        `layers`: (out, in) of each. Raises WeightSyncError for a target that the model does not have."""
        self.header = header
        self.num_slots = num_slots
        self.shapes = adapter_shapes(header, layers)
        """Shape of each tensor of an adapter by its name."""
        self.dtype, self.device = dtype, device
        self._fused: dict[str, _Fused] = {}
        """By the first layer of the matrix."""
        self._slot = NO_SLOT
        self._scale_NS1: Tensor | None = None
        for matrix in matrices:
            ends = np.cumsum([layers[layer][0] for layer in matrix]).tolist()
            spans = zip(matrix, [0, *ends], ends, strict=False)
            adapted = tuple(span for span in spans if header.adapts(span[0]))
            if adapted:
                size = (num_slots, len(adapted) * header.rank)
                # Zeros: foreign slots are multiplied by 0, and 0 times an uninitialized NaN is NaN.
                self._fused[matrix[0]] = _Fused(
                    layers=adapted,
                    down_SRC=torch.zeros(*size, layers[matrix[0]][1], dtype=dtype, device=device),
                    up_SRO=torch.zeros(*size, ends[-1], dtype=dtype, device=device),
                )

    def new_tensors(self) -> dict[str, Tensor]:
        """Uninitialized tensors of one adapter by name, to receive a push into."""
        return {
            name: torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }

    def check(self, header: AdapterHeader) -> None:
        """Raises WeightSyncError for an adapter that does not fit into the slots."""
        if header != self.header:
            raise WeightSyncError(
                f"the adapter has {header}, and this engine's adapters have {self.header}: "
                "an engine serves the adapters of one run"
            )

    @torch.inference_mode()
    def fill(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes one version's tensors, which are complete, into a slot that no sequence uses."""
        rank = self.header.rank
        for fused in self._fused.values():
            for index, (layer, start, end) in enumerate(fused.layers):
                rows = slice(index * rank, (index + 1) * rank)
                fused.down_SRC[slot, rows].copy_(tensors[a_name(layer)])
                fused.up_SRO[slot, rows, start:end].copy_(tensors[b_name(layer)].t())

    def select_one(self, slot: int) -> None:
        """All rows of the next passes use this slot, or none (`NO_SLOT`)."""
        self._slot, self._scale_NS1 = slot, None

    def select(self, slot_N: NDArray[np.int64]) -> None:
        """Row i of the next passes uses slot `slot_N[i]`, or none (`NO_SLOT`)."""
        if (slot_N == slot_N[0]).all():
            self.select_one(int(slot_N[0]))
            return
        # A new version gets the first free slot, so the slots in use are among the first.
        num_used = int(slot_N.max()) + 1
        scale_NS = (slot_N[:, None] == np.arange(num_used)) * np.float32(self.header.scaling)
        self._scale_NS1 = torch.from_numpy(scale_NS).to(self.device, self.dtype).unsqueeze(2)

    def add(self, matrix: str, x: Tensor, out: Tensor) -> Tensor:
        """Adds the adapters' product with `x` [N, C] to `out` [N, O], in place, and returns it. `matrix`: its
        first layer."""
        fused = self._fused.get(matrix)
        if fused is None:
            return out
        if self._scale_NS1 is None:
            if self._slot == NO_SLOT:
                return out
            low = F.linear(x, fused.down_SRC[self._slot])
            return out.addmm_(low, fused.up_SRO[self._slot], alpha=self.header.scaling)
        num_used = self._scale_NS1.shape[1]
        down_SRC, up_SRO = fused.down_SRC[:num_used], fused.up_SRO[:num_used]
        low = F.linear(x, down_SRC.flatten(0, 1)).view(len(x), num_used, -1) * self._scale_NS1
        return out.addmm_(low.flatten(1), up_SRO.flatten(0, 1))
