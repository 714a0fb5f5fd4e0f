"""One step of offline training, and the measurements of held-out rows.

    units -> micro-batches -> [forward -> sum of the losses -> backward]* -> divide -> clip -> AdamW

A unit is what must be in one micro-batch: a sequence, or all completions that are compared with one another.
The loss of a step is a mean over all tokens or comparisons of the step: sums over micro-batches and ranks are
divided once, by the global number. So it depends neither on the cuts nor on the number of ranks.

Shape suffix: K sums of a loss.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batching.packing import PackedBatch, Packer, in_lockstep
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.metrics.speed import StepSpeed
from trainer.metrics.step_totals import shared_share
from trainer.models.lora import use_dropout
from trainer.models.packed_model import PackedModel
from trainer.optimizer import ShardedAdamW

Unit = Sequence[TrainingSample]
"""Samples that are in one micro-batch."""
_TOKENS, _ROWS, _SEQUENCES, _MICROBATCHES, _FLOPS = range(5)
_NUM_COMMON = _FLOPS + 1


class RowFacts(Protocol):
    """The rows of one source (`trainer.offline.rows.OfflineRows`), as a loss sees them."""

    @property
    def facts(self) -> Mapping[str, NDArray[np.int64]]:
        """Name -> int64 [N] facts of all rows."""


class OfflineLoss(abc.ABC):
    """The loss of one kind of training: sums over a micro-batch, from which means over a step are made."""

    names: ClassVar[tuple[str, ...]]
    """Names of the sums [K] that a call returns."""
    divisor: ClassVar[str]
    """The one of them by which the gradient is divided: a number of tokens or comparisons."""
    others: Sequence[PackedModel] = ()
    """Further models that each call runs forward."""

    def __init__(self, model: PackedModel) -> None:
        """`model`: sharded."""
        self.model = model

    def begin(  # noqa: B027 - most losses need nothing
        self, rows: RowFacts, indices: Sequence[int], *, step: int | None
    ) -> None:
        """Prepares for the rows with these indices, over all ranks: those of a step, or held-out ones (None).
        Collective."""

    @abc.abstractmethod
    def __call__(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(sum of the losses, with gradient; float64 [K] sums without gradient, on the device).

        Collective. A batch may be a dummy, a single sample, of which nothing is used.
        """

    @abc.abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step, or of held-out rows, from the sums over all micro-batches and ranks.

        `loss` is among them. Numbers that are not known are left out.
        """

    def details(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Further facts of held-out rows, as JSON: numbers that the kind measures, and what only the run's
        summary shows."""
        return {}


class OfflineStep:
    """Runs steps on one rank's share of the units. Its methods are collective."""

    def __init__(
        self,
        loss: OfflineLoss,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        budget_tokens: int,
        peak_tflops: float = 0.0,
        dropout_seed: int | None = None,
    ) -> None:
        """`budget_tokens`: most tokens of a micro-batch.

        `peak_tflops`: peak of one rank's device, for MFU; 0: looked up by its name. `dropout_seed`: of the
        dropout of the model's adapter in training; None: no dropout.
        """
        self._dropout_seed = dropout_seed
        self._loss = loss
        self.model = loss.model
        self.optimizer = optimizer
        self._ranks = ranks
        self._budget_tokens = budget_tokens
        self._speed = StepSpeed(self.model, ranks, others=loss.others, peak_tflops=peak_tflops)

    def train(
        self, units: Iterable[Unit], *, step: int, prepare: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Runs one optimizer step after `step` completed steps; returns its metrics, equal on all ranks
        except for times. `prepare`: called first, the loss's `begin`; its time counts as `compute_s`.

        Metrics: those of the loss, grad_norm, lr, num_tokens, tokens_trained (num_tokens, unless the loss
        says otherwise), shared_share, num_sequences, num_microbatches, wait_s (for the units), compute_s,
        reduce_s, update_s, step_s, and those of `StepSpeed`. If the loss has nothing to learn from on any
        rank, the gradient is zero, and momentum and weight decay still move the weights.
        """
        timer = self._speed.begin(step)
        with timer.span("compute_s"):
            prepare()
        sums = self._sums()
        with self._dropout(step):
            for microbatch, live in self._microbatches(timer.timed("wait_s", units)):
                with timer.span("compute_s"):
                    loss, sums_K = self._loss(microbatch)
                    # Multiplied by zero on a rank without work, or with the work of another: the backward
                    # keeps FSDP2's collectives in step.
                    (loss if live else loss * 0.0).backward()  # type: ignore[no-untyped-call]
                    if live:
                        self._count(sums, sums_K, microbatch)
                        sums[_FLOPS] += self._speed.flops_of(microbatch)
        with timer.span("reduce_s"):
            common, of_loss = self._totals(sums)
        lr = self.optimizer.learning_rate(step)
        with timer.span("update_s"):
            grad_norm = self.optimizer.step(divisor=max(of_loss[self._loss.divisor], 1.0), lr=lr)
        num_tokens = common[_TOKENS]
        metrics = {
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": round(num_tokens),
            "shared_share": shared_share(num_tokens=num_tokens, num_rows=common[_ROWS]),
            "tokens_trained": round(num_tokens),
            "num_sequences": round(common[_SEQUENCES]),
            "num_microbatches": round(common[_MICROBATCHES]),
        }
        metrics |= self._loss.metrics(of_loss)
        return metrics | self._speed.metrics(timer, num_tokens=num_tokens, flops=common[_FLOPS])

    @torch.no_grad()
    def measure(self, units: Iterable[Unit]) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics of the loss, its details) over all ranks' units, without an update."""
        sums = self._sums()
        for microbatch, live in self._microbatches(units):
            _, sums_K = self._loss(microbatch)
            if live:
                self._count(sums, sums_K, microbatch)
        _, of_loss = self._totals(sums)
        return self._loss.metrics(of_loss), self._loss.details(of_loss)

    @contextlib.contextmanager
    def _dropout(self, step: int) -> Iterator[None]:
        """Dropout is on within the block. Its draws depend on seed, step and rank alone, so a resumed run
        draws what it would have drawn."""
        if self._dropout_seed is None:
            yield
            return
        device, model = self._ranks.device, self.model.model
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            place = step * self._ranks.world_size + self._ranks.rank
            torch.manual_seed(int(np.random.SeedSequence([self._dropout_seed, place]).generate_state(1)[0]))
            use_dropout(model, True)
            try:
                yield
            finally:
                use_dropout(model, False)

    def _sums(self) -> Tensor:
        # On the device until the end of the step: reading a number during the step would stall a GPU.
        size = _NUM_COMMON + len(self._loss.names)
        return torch.zeros(size, dtype=torch.float64, device=self._ranks.device)

    @staticmethod
    def _count(sums: Tensor, sums_K: Tensor, batch: PackedBatch) -> None:
        for at, number in (
            (_TOKENS, batch.num_tokens),
            (_ROWS, batch.num_rows),
            (_SEQUENCES, batch.num_sequences),
        ):
            sums[at] += number
        sums[_MICROBATCHES] += 1
        sums[_NUM_COMMON:] += sums_K

    def _totals(self, sums: Tensor) -> tuple[list[float], dict[str, float]]:
        """(common sums, sums of the loss by name) over all ranks."""
        totals: list[float] = self._ranks.sum(sums.cpu()).tolist()
        return totals[:_NUM_COMMON], dict(zip(self._loss.names, totals[_NUM_COMMON:], strict=True))

    def _microbatches(self, units: Iterable[Unit]) -> Iterator[tuple[PackedBatch, bool]]:
        shares = self.model.shares_prefixes
        packer = Packer(budget_tokens=self._budget_tokens, whole_groups=True, shares_prefixes=shares)
        return in_lockstep(packer.microbatches(units), self._ranks, shares_prefixes=shares)
