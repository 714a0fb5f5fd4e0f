"""Accumulates the gradients of a step's micro-batches; an objective chooses the accumulator.

The plain one lets autograd add each micro-batch to `.grad`, where FSDP2 reduces and shards it. A method that
needs more than a sum, such as a baseline from the norms of single sequences' gradients, overrides `Gradients`
and leaves the step's sum in `.grad` by other means.
"""

from __future__ import annotations

from types import TracebackType

from torch import Tensor

from trainer.batching.packing import PackedBatch
from trainer.batching.sampled_tokens import SampledTokens


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
        """Restores the policy to its state before entering."""

    def add(self, loss_S: Tensor, *, tokens: SampledTokens, batch: PackedBatch) -> None:
        """Adds the gradient of one micro-batch. Collective.

        `loss_S`: losses weighted by the normaliser but not yet divided by its divisor; all zero for a dummy.
        """
        loss_S.sum().backward()  # type: ignore[no-untyped-call]
        self._loss += loss_S.detach().sum()

    def finish(self) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Completes the gradient; returns this rank's (sum, count) of `loss` and other metrics.

        Collective.
        """
        return {"loss": (self._loss, 1.0)}
