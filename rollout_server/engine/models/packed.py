"""Products with weights in bfloat16, on a CPU that multiplies bfloat16 fast: oneDNN's kernels and layout.

Those kernels read a weight in blocks of their own. From torch's layout they build the blocks anew in every
product, which for the few rows of a decode step takes longer than the product. So a set of weights is packed
once, when it is activated. The named tensors, which pushes fill and digests cover, stay as they are.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from areal_like.precision import cpu_is_fast_in_bfloat16

_EXPECTED_ROWS = 64
"""Rows for which the layout is chosen."""


def can_pack(*, dtype: torch.dtype, device: torch.device) -> bool:
    """True if products of this dtype and device are faster with packed weights."""
    return dtype == torch.bfloat16 and device.type == "cpu" and cpu_is_fast_in_bfloat16()


def packed(weight_OI: Tensor) -> Tensor:
    """A copy of the weight in oneDNN's layout, which only the functions of this module can read."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _EXPECTED_ROWS)
    return copy


def linear(x_NI: Tensor, packed_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[N, O]: `F.linear`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, packed_OI, bias_O, "none", [], "")
    return out


def added(out_NO: Tensor, x_NI: Tensor, packed_OI: Tensor) -> Tensor:
    """[N, O]: `out` plus the product, rounded once."""
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_NI, out_NO, packed_OI, None, "add")
    return total


def fp32_linear(x_NI: Tensor, packed_OI: Tensor) -> Tensor:
    """float32[N, O]: the product to 16 bits, as `areal_like.precision` splits it."""
    first_NO = linear(x_NI, packed_OI)
    rest_NO = torch.ops.mkldnn._linear_pointwise.binary(x_NI, first_NO, packed_OI, None, "sub")
    return first_NO.float().add_(rest_NO)
