"""Merges a base model with an adapter into a Hugging Face directory: W + scale B A, in float32, then rounded.

One parameter at a time is in memory. The directory gets its name when it is complete.

Shape suffixes: O outputs of a layer, I its inputs, R rank of the adapter.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from areal_like.config import LoraConfig
from areal_like.errors import ConfigError
from areal_like.paths import replacing
from areal_like.weights.adapters import PEFT_PREFIX, base_digest
from areal_like.weights.hf_layout import adapter_tensors, hf_tensors
from areal_like.weights.safetensors_header import tensors_in
from areal_like.weights.untrained import text_config
from trainer.checkpoints.writing import CODES, HfFiles, write_model_files, write_tokenizer
from trainer.models.lora import add_adapter, layer_matrices, merged_rows, scales
from trainer.models.packed_model import build_skeleton, tied_names
from trainer.models.peft_folder import (
    WEIGHTS_FILE,
    Advice,
    check_adapter_of,
    check_base,
    check_layers,
    check_plain,
    layer_names,
    open_adapter,
    read_config,
)
from trainer.models.row_loading import StoredNames, listed, stored_names
from trainer.models.safetensors_rows import SafetensorsRows
from trainer.models.wide_vectors import stored_wide

_KEY = "merge"


def merge(adapter: str, into: Path, *, base: str = "", dtype: str = "") -> str:
    """Writes the merged model into the new directory `into`; returns the base that was used.

    `adapter`: PEFT directory or hub name. `base`: Hugging Face directory or name; empty: the one that
    adapter_config.json names. `dtype`: of the files, `float32`, `bfloat16` or `float16`; empty: the base's.
    Raises ConfigError.
    """
    if into.exists():
        raise ConfigError(f"{into} exists: name a new directory")
    matrices = open_adapter(adapter, key=_KEY)
    config = read_config(adapter, key=_KEY)
    check_plain(adapter, config)
    named = str(config.get("base_model_name_or_path") or "")
    advice = _advice(base=base, named=named)
    base = base or named
    if not base:
        raise ConfigError(f"{adapter} does not name its base model: give it with --base")
    model = build_skeleton(base, dtype=torch.float32)
    tied = tied_names(model)
    check_layers(model, matrices, advice=advice)
    _check_linear(model, matrices)
    add_adapter(
        model,
        LoraConfig(rank=config["r"], alpha=float(config["lora_alpha"]), targets=layer_names(matrices)),
    )
    check_adapter_of(model, matrices, advice=advice)
    source = SafetensorsRows.of_model(base)
    check_base(adapter, base=base_digest(source.files), advice=advice)
    stored = stored_names(model, source, tied=tied)
    own_dtype = getattr(torch, dtype) if dtype else _dtype_of(base)
    if own_dtype not in CODES:
        raise ConfigError(f"{base} has the dtype {own_dtype}: give --dtype float32 or --dtype bfloat16")
    places = {tensor.name: tensor for file in source.files for tensor in tensors_in(file)}
    files = HfFiles(
        hf_tensors(model),
        own_dtype,
        float32_names=stored_wide(model, source, tied=tied),
        untouched=[places[name] for name in stored.untouched],
    )
    rows = _MergedParameters(model, stored, source=source, matrices=matrices)
    with replacing(into) as partial:
        partial.mkdir(parents=True)
        try:
            files.create(partial)
            files.write_rows(partial, rows, dict.fromkeys(rows, 0))
            files.copy_untouched(partial)
            write_model_files(model, partial, base=base, dtype=own_dtype)
            write_tokenizer(partial, base)
        except BaseException:
            shutil.rmtree(partial)
            raise
    return base


def _dtype_of(base: str) -> Any:
    """The dtype that the base's config.json names, else float32."""
    # Read again: a skeleton's configuration has the dtype of the skeleton.
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    return text_config(config).dtype or config.dtype or torch.float32


def _advice(*, base: str, named: str) -> Advice:
    """What a user of `merge` changes. `base`: the one given with --base; `named`: in adapter_config.json."""
    if not base:
        other = f"{named} has changed since then: give the model that the adapter was made for with --base"
    elif named and named != base:
        other = f"leave out --base, and {named} is used, which the adapter names"
    else:
        other = "give the model that the adapter was made for with --base"
    return Advice(
        base=other,
        layers="merge needs matrices for every layer of the names {names}: merge this adapter with PEFT",
    )


def _check_linear(model: Any, matrices: SafetensorsRows) -> None:
    """Raises ConfigError if the file has matrices for the output head, or for layers that are not linear."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    layers = {name.rpartition(".lora_")[0].removeprefix(PEFT_PREFIX) for name in matrices.names}
    refused = sorted(
        layer for layer in layers if modules[layer] is head or not isinstance(modules[layer], nn.Linear)
    )
    if refused:
        raise ConfigError(
            f"{matrices.folder / WEIGHTS_FILE} has matrices for {listed(refused)}, and merge takes those of "
            "linear layers other than the output head: merge this adapter with PEFT"
        )


class _MergedParameters(Mapping[str, Tensor]):
    """Parameter's name -> its merged weights in float32, computed on access; the last one is kept."""

    def __init__(
        self,
        model: Any,
        stored: StoredNames,
        *,
        source: SafetensorsRows,
        matrices: SafetensorsRows,
    ) -> None:
        self._shapes = {tensor.param: model.get_parameter(tensor.param).shape for tensor in stored.tensors}
        self._tensors = stored.tensors
        self._stored = stored.names
        self._source, self._matrices = source, matrices
        self._names = {tensor.param: tensor.name for tensor in adapter_tensors(model)}
        self._layers = {
            weight: (a, b, scale)
            for layer, scale in scales(model).items()
            for weight, a, b in [layer_matrices(layer)]
        }
        self._last = functools.lru_cache(maxsize=1)(self._merged)

    def __getitem__(self, param: str) -> Tensor:
        return self._last(param)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @torch.no_grad()
    def _merged(self, param: str) -> Tensor:
        whole = torch.full(self._shapes[param], math.nan)
        for tensor in self._tensors:
            if tensor.param == param:
                self._source.copy(self._stored[tensor.name][0], tensor.whole_in(whole), first=0)
        if param in self._layers:
            a, b, scale = self._layers[param]
            a_RI, b_OR = (self._matrices.tensor(self._names[name]).float() for name in (a, b))
            whole = merged_rows(whole, a_RI, b_OR, scale=scale)
        return whole
