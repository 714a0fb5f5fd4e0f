"""The tensors of a Hugging Face checkpoint as parts of a model's parameters.

Checkpoints, pushes and loading use the names and shapes of the Hugging Face checkpoint, which engines know.
Most of its tensors are one parameter each. transformers fuses others: the experts of a mixture-of-experts
layer are one parameter `[experts, rows, columns]` in the model and one tensor per expert and projection in
the checkpoint.

FSDP2 shards the first dimension of each parameter. So every rank holds some rows of a tensor that is a whole
parameter, and either all or nothing of a tensor that is a part of one row of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """One tensor of the checkpoint."""

    name: str
    """In the checkpoint and on the wire."""
    shape: tuple[int, ...]
    param: str
    """Name of the transformers model's parameter that holds it."""
    row: int | None = None
    """The row of the parameter (its index in dimension 0) that holds this tensor; None: the tensor is the
    whole parameter."""
    within: tuple[int, int] | None = None
    """With `row`: (first, end) in dimension 0 of that row; None: the whole row."""

    def part_in(self, rows: Tensor, *, first_row: int) -> tuple[Tensor, int] | None:
        """The part of this tensor that is among one rank's rows of the parameter.

        `rows`: the rank's rows, without padding, the first of which is row `first_row` of the parameter.
        Returns (view of `rows`, index in dimension 0 of this tensor at which the view begins), or None if
        none of the tensor is there.
        """
        if self.row is None:
            return (rows, first_row) if rows.numel() else None
        if not first_row <= self.row < first_row + len(rows):
            return None
        row = rows[self.row - first_row]
        return (row if self.within is None else row[self.within[0] : self.within[1]]), 0


def hf_tensors(model: nn.Module) -> list[HfTensor]:
    """The checkpoint's tensors of a transformers model, in the order of its parameters; tied weights once.

    `model`: may be on the meta device, and sharded.
    """
    return [
        HfTensor(name=name, shape=tuple(param.shape), param=name) for name, param in model.named_parameters()
    ]
