"""How the micro-batches of a step become its gradient; a choice of the objective's.

Plain: autograd adds each micro-batch to `.grad`, reduced and sharded by FSDP2. A method that needs more than a sum, such as a baseline
from the norms of single sequences' gradients, brings a subclass that leaves the step's sum in `.grad` by its own way.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from trainer.batching.packing import PackedBatch
    from trainer.objectives.base import SampledTokens


class Gradients:
    """Of one step at a time: [entered -> add() a micro-batch, many -> finish() -> left]*. Leaving without finish() gives the step up."""

    def __enter__(self) -> Gradients:
        self._loss: Tensor | float = 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undoes what entering did to the policy."""

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """Adds one micro-batch; collective. `loss_S` is weighted by the normaliser, not yet divided; all zero for a dummy."""
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        self._loss += loss_S.detach().sum()

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """After the last micro-batch; collective. This rank's (sum, count) of `loss` and of what else became known."""
        return {"loss": (self._loss, 1.0)}
