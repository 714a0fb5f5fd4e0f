"""The vectors of linear-attention layers that a checkpoint keeps in float32, whatever `model.dtype` is.

The decay of a state is exp(-exp(A_log) softplus(a + dt_bias)): rounding A_log to bfloat16 changes exp(A_log)
by up to 1.6 % for |A_log| < 8, and with it how long a state lasts. So a published checkpoint may store such
vectors in float32 beside matrices in bfloat16. What a checkpoint stores in float32 stays float32 in the
trainer's forward, in pushes and in the files of weights; everything else has `model.dtype`.

FSDP2 gathers all parameters of a group in one dtype. So these vectors are gathered again, exactly, once for
each forward: a few kilobytes for a whole model. Their gradients take FSDP2's way like all others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention.linear import LinearAttention, linear_layers
from trainer.distributed.sharding import RowShard, gather_everywhere
from trainer.models.row_loading import stored_names
from trainer.models.safetensors_rows import INDEX_FILE, SINGLE_FILE, SafetensorsRows, find_file

_FLOAT32 = "F32"


def wide_vectors(
    model: Any, path: str, *, tied: Mapping[str, str], fresh: Collection[str] = ()
) -> frozenset[str]:
    """Names of the parameters of `model` that stay float32: vectors of linear-attention layers whose tensors
    in the files of `path` are float32. Empty for a directory without weights.

    Arguments and errors are those of `row_loading.stored_names`.
    """
    vectors = _vectors(model)
    if not vectors or all(find_file(path, name) is None for name in (SINGLE_FILE, INDEX_FILE)):
        return frozenset()
    return stored_wide(model, SafetensorsRows.of_model(path), tied=tied, fresh=fresh)


def stored_wide(
    model: Any, source: SafetensorsRows, *, tied: Mapping[str, str], fresh: Collection[str] = ()
) -> frozenset[str]:
    """As `wide_vectors`, from opened files."""
    vectors = _vectors(model)
    if not vectors:
        return frozenset()
    stored = stored_names(model, source, tied=tied, fresh=fresh)
    return frozenset(
        tensor.param
        for tensor in stored.tensors
        if tensor.param in vectors and source.dtype(stored.names[tensor.name][0]) == _FLOAT32
    )


def _vectors(model: nn.Module) -> set[str]:
    layers = {id(layer) for layer in linear_layers(model)}
    return {
        f"{path}.{name}"
        for path, layer in model.named_modules()
        if id(layer) in layers
        for name, param in layer.named_parameters()
        if param.ndim == 1
    }


class WideVectors:
    """Gives each layer its exact vectors before a forward."""

    def __init__(self, model: nn.Module, names: Collection[str], layers: Sequence[LinearAttention]) -> None:
        """`model`: a sharded transformers model; `names`: as `wide_vectors` returns them; `layers`: all of
        its linear-attention layers."""
        self._params = {name: param for name, param in model.named_parameters() if name in names}
        of_module = {id(each.layer): each for each in layers}
        self._places: dict[str, tuple[LinearAttention, str]] = {}
        for path, module in model.named_modules():
            if (owner := of_module.get(id(module))) is not None:
                for name in self._params:
                    if name.startswith(f"{path}."):
                        self._places[name] = owner, name.removeprefix(f"{path}.")

    @torch.no_grad()
    def gather(self) -> None:
        """Collective."""
        shards = [RowShard.of(name, param) for name, param in self._params.items()]
        whole: Mapping[str, Tensor] = gather_everywhere(shards)
        for name, (layer, path) in self._places.items():
            layer.exact[path] = whole[name]
