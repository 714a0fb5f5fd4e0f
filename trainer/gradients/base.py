"""Accumulates the gradients of a step's micro-batches; an objective chooses the accumulator.

The default accumulator lets autograd add the gradient of each micro-batch to `.grad`; FSDP2 reduces and
shards it. A method that needs more than a sum, such as a baseline from the norms of single sequences'
gradients, subclasses `Gradients` and writes the step's gradient to `.grad` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

from torch import Tensor

from trainer.batching.packing import PackedBatch
from trainer.batching.sampled_tokens import SampledTokens

WeightsN: TypeAlias = Callable[[SampledTokens], Tensor]
"""Returns the weights [N] of a micro-batch's sequence gradients."""


class Gradients:
    """Accumulates one step at a time: [enter -> add() per micro-batch -> finish() -> exit]*.

    Exit without finish() abandons the step.
    """

    def __enter__(self) -> Gradients:
        self._loss: Tensor | float = 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undoes the changes to the policy that entering made (this class makes none)."""

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """Adds the gradient of one micro-batch. Collective.

        `loss_S`: losses weighted by the normalizer but not yet divided by its divisor; all zero for a dummy.
        """
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        self._loss += loss_S.detach().sum()

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Completes the gradient; returns this rank's (sum, count) of `loss` and other metrics.

        Collective.
        """
        return {"loss": (self._loss, 1.0)}
