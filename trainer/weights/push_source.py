"""What a push sends: the policy's own weights, the base merged with its adapter, or the adapter alone.

    begin() -> rows() of each parameter, in any order -> end()      for each snapshot, on every rank

With `weights.lora=adapter` engines compute as the trainer does, x W^T + scale (x A^T) B^T, and get A and B.
With `merged` they know nothing of adapters: they get W + scale B A under the names of the base. The sum is
computed in float32 and then rounded to the dtype on the wire. In bfloat16 an update of the adapter that is
smaller than half a step of a weight's number is lost for the engines until it has grown (the trainer's own
forward adds the adapter's output to that of the base and sees it). `MergedWeights` measures the share of such
updates, so that one can tell whether the engines learn as the trainer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.hf_layout import HfTensor, adapter_tensors, hf_tensors
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import RowShard, gather_everywhere, local
from trainer.models.lora import layer_matrices, merged_rows, scales
from trainer.models.packed_model import DTYPES
from trainer.models.policy import Policy

LOST_UPDATES = "lora_lost_updates"
"""Metric: of the numbers of merged weights that changed in float32 from one snapshot to the next, the share
that is the same in the dtype on the wire."""


class PushSource(Protocol):
    """One rank's rows of the tensors that are pushed."""

    tensors: Sequence[HfTensor]
    """All tensors of a push, in the order of sending."""
    adapter: AdapterHeader | None
    """Header of the adapter, if the tensors are those of an adapter alone."""

    def begin(self) -> None:
        """Before a snapshot is copied. Collective."""

    def rows(self, param: str) -> Tensor:
        """This rank's rows of a parameter, of any dtype; valid until the next call."""

    def end(self) -> dict[str, float]:
        """Figures of the snapshot, equal on all ranks. Collective."""


class OwnWeights:
    """Parameters of a transformers model as they are."""

    def __init__(
        self, model: Any, tensors: Sequence[HfTensor], *, adapter: AdapterHeader | None = None
    ) -> None:
        """`tensors`: all of the checkpoint's, or those of the adapter with the header `adapter`."""
        self.tensors = tensors
        self.adapter = adapter
        self._rows = {name: local(param.detach()) for name, param in model.named_parameters()}

    def begin(self) -> None:
        """Does nothing."""

    def rows(self, param: str) -> Tensor:
        return self._rows[param]

    def end(self) -> dict[str, float]:
        return {}


class MergedWeights:
    """The base of a model with an adapter, merged with it."""

    def __init__(self, model: Any, ranks: Ranks, *, dtype: torch.dtype) -> None:
        """`dtype`: dtype on the wire."""
        self.tensors: Sequence[HfTensor] = hf_tensors(model)
        self.adapter: AdapterHeader | None = None
        self._ranks = ranks
        self._dtype = dtype
        self._params = dict(model.named_parameters())
        self._rows = {name: local(param.detach()) for name, param in self._params.items()}
        self._layers = {
            weight: (a, b, scale)
            for layer, scale in scales(model).items()
            for weight, a, b in [layer_matrices(layer)]
        }
        """Parameter of an adapted layer's W -> those of A and B, and the scale."""
        self._whole: dict[str, Tensor] = {}
        """A of each layer, whole, under the name of W."""
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        """A and this rank's rows of B in the snapshot before, under the name of W."""
        self._counts = torch.zeros(2, dtype=torch.float64)

    def begin(self) -> None:
        """Gathers A of all layers on every rank."""
        shards = [RowShard.of(weight, self._params[a]) for weight, (a, _, _) in self._layers.items()]
        self._whole = gather_everywhere(shards)
        self._counts = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)

    @torch.no_grad()
    def rows(self, param: str) -> Tensor:
        weight = self._rows[param]
        if param not in self._layers:
            return weight
        _, b, scale = self._layers[param]
        a_now, b_now = self._whole[param], self._rows[b]
        merged = merged_rows(weight, a_now, b_now, scale=scale)
        if self._measures:
            if param in self._before:
                before = merged_rows(weight, *self._before[param], scale=scale)
                changed = merged != before
                is_lost = changed & (merged.to(self._dtype) == before.to(self._dtype))
                self._counts += torch.stack([is_lost.sum(), changed.sum()])
            self._before[param] = a_now.clone(), b_now.clone()
        return merged

    def end(self) -> dict[str, float]:
        self._whole = {}
        if not self._measures:
            return {LOST_UPDATES: 0.0}
        num_lost, num_changed = self._ranks.sum(self._counts.cpu()).tolist()
        return {LOST_UPDATES: num_lost / max(num_changed, 1.0)}

    @property
    def _measures(self) -> bool:
        """False if nothing is rounded."""
        return self._dtype.itemsize < torch.float32.itemsize


def push_source(policy: Policy, ranks: Ranks, *, dtype: str, lora: str) -> PushSource:
    """What the pushes of this policy send. `dtype`: dtype on the wire. `lora`: `weights.lora`."""
    model = policy.model
    if not policy.has_adapter:
        return OwnWeights(model, hf_tensors(model))
    if lora == "adapter":
        return OwnWeights(model, adapter_tensors(model), adapter=policy.adapter_header)
    return MergedWeights(model, ranks, dtype=DTYPES[dtype])
