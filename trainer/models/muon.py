"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) in float32, for models on a CPU.

The momentum of each matrix is made nearly orthogonal by five Newton-Schulz iterations. `torch.optim.Muon`
computes them in bfloat16: a CPU without bfloat16 instructions takes ten times as long for each product, and
the trained weights depend on how a CPU rounds. For its Nesterov momentum and the factor of the learning rate
see there; this one has no weight decay and no sharded matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial that moves every singular value to about 1."""
NUM_ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2
"""Of an update whose learning rate is 1: that of AdamW (Liu et al., 2025, arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """An optimizer of float32 matrices [rows, columns]."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                momentum = state.setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                matrix.sub_(update, alpha=group["lr"] * RMS * math.sqrt(max(matrix.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values moved to between .6 and 1.2: float32[rows, columns]."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    a, b, c = COEFFICIENTS
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return matrix
