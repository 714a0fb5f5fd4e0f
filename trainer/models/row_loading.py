"""Reads each rank's rows of a model's initial weights from the files of a Hugging Face checkpoint.

Names are resolved as in transformers' `from_pretrained`: its renamings, the prefix of the base model, and
tied weights under either name. Unlike in transformers, a missing or an unknown tensor is an error: a
parameter with random values, or weights that only the engines have, would be noticed much later.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from areal_like.errors import ConfigError
from areal_like.weights.hf_layout import HfTensor, hf_tensors
from areal_like.weights.untrained import NamesInModel, check_buffer, persistent_buffers
from trainer.distributed.sharding import local, row_range
from trainer.models.safetensors_rows import SafetensorsRows


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """What the tensors in the files of a checkpoint are for a transformers model."""

    tensors: Sequence[HfTensor]
    """Those that are read into parameters."""
    names: Mapping[str, Sequence[str]]
    """Name of each of them -> its names in the files: several if tied weights are stored more than once."""
    untouched: Sequence[str]
    """Tensors in the files that training leaves as they are and that are saved with every checkpoint, in the
    order of the files."""
    obsolete: Sequence[str]
    """Tensors in the files that no model needs: buffers that are computed."""


@torch.no_grad()
def read_rows(
    model: Any, source: SafetensorsRows, *, rank: int, world_size: int, tied: Mapping[str, str]
) -> None:
    """Copies this rank's rows of every parameter of a transformers model out of `source`.

    `tied`: other names of parameters -> the name of the parameter. Raises ConfigError, before anything is
    copied, if names or shapes do not match the model.
    """
    stored = stored_names(model, source, tied=tied, with_buffers=False)
    copy_rows(model, source, stored.tensors, stored.names, rank=rank, world_size=world_size)


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
    """Copies this rank's rows of `tensors` out of `source`. `stored`: as `StoredNames.names`."""
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
    with_buffers: bool = True,
) -> StoredNames:
    """Finds out what each tensor in the files is for the model.

    It reads only the headers of the files, and `model` may be on the meta device. `tied`: other names of
    parameters -> the name of the parameter. `fresh`: parameters that are not read. `with_buffers`: the files
    have to contain the persistent buffers too. Raises ConfigError if names, shapes or dtypes do not fit the
    model.
    """
    tensors = [tensor for tensor in hf_tensors(model) if tensor.param not in fresh]
    known = {t.param: t.name for t in tensors if t.row is None and t.within is None}
    known |= {tensor.name: tensor.name for tensor in tensors}
    ignored = dict.fromkeys(fresh, "")
    aliases = {alias: known[name] for alias, name in tied.items() if name in known}
    lookup = ignored | aliases | known
    buffers = dict(persistent_buffers(model))
    absent = set(buffers) if with_buffers else set()
    names_in_model = NamesInModel(model, {**lookup, **buffers})
    is_obsolete, is_extra = _obsolete(model), _patterns(model._keys_to_ignore_on_load_unexpected or ())
    stored: dict[str, list[str]] = {tensor.name: [] for tensor in tensors}
    unknown, untouched, obsolete = [], [], []
    for name in source.names:
        renamed = names_in_model(name)
        target = lookup.get(renamed, lookup.get(name))
        if target is not None:
            if target and renamed in known:
                stored[target].insert(0, name)
            elif target:
                stored[target].append(name)
        elif buffer := next((each for each in (renamed, name) if each in buffers), None):
            check_buffer(model, buffer, source.shape(name), place=f"{source.file_of(name)}: {name}")
            untouched.append(name)
            absent.discard(buffer)
        elif is_obsolete.search(name):
            obsolete.append(name)
        elif names_in_model.is_left_out(name, renamed) or is_extra.search(name):
            untouched.append(name)
        else:
            unknown.append(name)
    _check(model, tensors, source, stored, unknown=unknown, absent=sorted(absent))
    return StoredNames(tensors=tensors, names=stored, untouched=untouched, obsolete=obsolete)


def _obsolete(model: Any) -> re.Pattern[str]:
    """Names of computed buffers, which old files contain."""
    buffers = [re.escape(name) + "$" for name, _ in model.named_buffers()]
    return _patterns([r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *buffers])


def _patterns(patterns: Collection[str]) -> re.Pattern[str]:
    """Matches where any of the patterns does; nothing if there are none."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def _check(
    model: Any,
    tensors: Sequence[HfTensor],
    source: SafetensorsRows,
    stored: Mapping[str, Sequence[str]],
    *,
    unknown: Sequence[str],
    absent: Sequence[str],
) -> None:
    kind = type(model).__name__
    if missing := [*(tensor.name for tensor in tensors if not stored[tensor.name]), *absent]:
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
