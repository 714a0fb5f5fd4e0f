"""Reads each rank's rows of a model's initial weights from the files of a Hugging Face checkpoint.

Names are resolved as in transformers' `from_pretrained`: its renamings, the prefix of the base model, and
tied weights under either name. Unlike in transformers, a missing or an unknown tensor is an error: a
parameter with random values, or weights that only the engines have, would be noticed much later.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from areal_like.errors import ConfigError
from areal_like.weights.hf_layout import HfTensor, hf_tensors
from trainer.distributed.sharding import local, row_range
from trainer.models.safetensors_rows import SafetensorsRows


@torch.no_grad()
def read_rows(
    model: Any,
    source: SafetensorsRows,
    *,
    rank: int,
    world_size: int,
    tied: Mapping[str, str],
    fresh: Collection[str] = (),
) -> None:
    """Copies this rank's rows of every parameter of a transformers model out of `source`.

    `tied`: other names of parameters -> the name of the parameter. `fresh`: parameters that are not read.
    Raises ConfigError, before anything is copied, if names or shapes do not match the model.
    """
    tensors, stored = stored_names(model, source, tied=tied, fresh=fresh)
    copy_rows(model, source, tensors, stored, rank=rank, world_size=world_size)


@torch.no_grad()
def copy_rows(
    model: Any,
    source: SafetensorsRows,
    tensors: Sequence[HfTensor],
    stored: Mapping[str, Sequence[str]],
    *,
    rank: int,
    world_size: int,
) -> None:
    """Copies this rank's rows of `tensors` out of `source`. `stored`: as `stored_names` returns it."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    order = {name: place for place, name in enumerate(source.names)}
    for tensor in sorted(tensors, key=lambda tensor: order[stored[tensor.name][0]]):
        param = params[tensor.param]
        first_row, _ = row_range(param.shape, rank=rank, world_size=world_size)
        if (part := tensor.part_in(local(param), first_row=first_row)) is None:
            continue
        into, first = part
        name, *copies = stored[tensor.name]
        source.copy(name, into, first=first)
        for other in copies:
            if not _holds(source, other, into, first=first):
                raise ConfigError(
                    f"{source.file_of(other)}: config.json ties {other} to {name}, and the two differ: set "
                    "tie_word_embeddings to false there"
                )
    source.close()


def _holds(source: SafetensorsRows, name: str, expected: Tensor, *, first: int) -> bool:
    """True if the rows of `name` from `first` on equal `expected`."""
    return all(
        torch.equal(rows.to(expected), expected[start - first : start - first + len(rows)])
        for start, rows in source.pieces(name, first, first + len(expected))
    )


def stored_names(
    model: Any,
    source: SafetensorsRows,
    *,
    tied: Mapping[str, str],
    fresh: Collection[str] = (),
) -> tuple[list[HfTensor], dict[str, list[str]]]:
    """(tensors that are read, name of a tensor -> its names in the files: several if tied weights are stored
    more than once).

    It reads only the headers of the files, and `model` may be on the meta device. Arguments and errors are
    those of `read_rows`.
    """
    tensors = [tensor for tensor in hf_tensors(model) if tensor.param not in fresh]
    known = {t.param: t.name for t in tensors if t.row is None and t.within is None}
    known |= {tensor.name: tensor.name for tensor in tensors}
    ignored = dict.fromkeys(fresh, "")
    aliases = {alias: known[name] for alias, name in tied.items() if name in known}
    lookup = ignored | aliases | known
    renamings = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightRenaming)]
    stored: dict[str, list[str]] = {tensor.name: [] for tensor in tensors}
    unknown = []
    for name in source.names:
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, lookup)
        target = lookup.get(renamed, lookup.get(name))
        if target is None:
            unknown.append(name)
        elif target and renamed in known:
            stored[target].insert(0, name)
        elif target:
            stored[target].append(name)
    _check(model, tensors, source, stored, unknown=_unexpected(model, unknown))
    return tensors, stored


def _unexpected(model: Any, unknown: Iterable[str]) -> list[str]:
    """The unknown names that the model's class does not allow: old files also store buffers."""
    allowed = {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}
    allowed |= set(model._keys_to_ignore_on_load_unexpected or ())
    allowed |= {re.escape(name) + "$" for name, _ in model.named_buffers()}
    return [name for name in unknown if not any(re.search(pattern, name) for pattern in allowed)]


def _check(
    model: Any,
    tensors: Sequence[HfTensor],
    source: SafetensorsRows,
    stored: Mapping[str, Sequence[str]],
    *,
    unknown: Sequence[str],
) -> None:
    kind = type(model).__name__
    if missing := [tensor.name for tensor in tensors if not stored[tensor.name]]:
        raise ConfigError(
            f"{source.folder}: the safetensors files lack {listed(missing)} of {kind}: download the model "
            "again, or name one whose files fit its config.json"
        )
    if unknown:
        raise ConfigError(
            f"{source.folder}: the safetensors files hold {listed(unknown)}, which {kind} does not have: "
            "name a model whose files fit its config.json"
        )
    for tensor in tensors:
        for name in stored[tensor.name]:
            if source.shape(name) != tensor.shape:
                raise ConfigError(
                    f"{source.file_of(name)}: {name} has shape {list(source.shape(name))}, and {kind} needs "
                    f"{list(tensor.shape)}: name a model whose files fit its config.json"
                )
            if not source.is_float(name):
                raise ConfigError(
                    f"{source.file_of(name)}: {name} is quantized or not a floating-point tensor, which "
                    "cannot be trained: name another model"
                )


def listed(names: Sequence[str], *, most: int = 3) -> str:
    """The first names, and the number of the others, for a message."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
