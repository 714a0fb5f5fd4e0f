"""The tensors of a Hugging Face checkpoint as parts of a model's parameters.

Checkpoints, pushes and loading use the names and shapes of the Hugging Face checkpoint, which engines know.
Most of its tensors are one parameter each. transformers fuses others: the experts of a mixture-of-experts
layer are one parameter `[experts, rows, columns]` in the model and one tensor per expert and projection in
the checkpoint.

`hf_tensors` derives the map from transformers' own conversions (`core_model_loading`, from 5.17 on) and knows
no architecture by name: it lets transformers convert parameters that hold their own positions, and finds each
result's place from the positions in it. The matrices of LoRA adapters are parameters, but not in the
checkpoint (`adapter_tensors` names those). Left out: tensors that are not a contiguous block of rows of one
parameter (transposed, interleaved, or made of several parameters). Such an architecture is refused.

FSDP2 shards the first dimension of each parameter. So every rank holds some rows of a tensor that is a whole
parameter or some of its rows, and either all or nothing of a tensor that is a part of one row of a parameter.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from areal_like.errors import ConfigError
from areal_like.weights.adapters import PEFT_PREFIX

_COLUMNS = 3
"""Length of the last dimension while positions are converted, instead of the real one, so that the positions
of a large model fit into memory. More than 1, so that a transposition shows; odd, so that an interleaving and
a split do."""
_BATCH_POSITIONS = 1 << 23
"""Positions that are converted at a time (8 bytes each)."""


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """One tensor of the checkpoint."""

    name: str
    """Name in the checkpoint and on the wire."""
    shape: tuple[int, ...]
    param: str
    """Name of the transformers model's parameter that holds it."""
    row: int | None = None
    """The row of the parameter (its index in dimension 0) that holds this tensor; None: the tensor is whole
    rows of the parameter."""
    within: tuple[int, int] | None = None
    """(first, end) in dimension 0 of that row, or of the parameter if `row` is None; None: all of it."""

    def part_in(self, rows: Tensor, *, first_row: int) -> tuple[Tensor, int] | None:
        """The part of this tensor that lies in one rank's rows of the parameter.

        `rows`: the rank's rows, without padding, the first of which is row `first_row` of the parameter.
        Returns (view of `rows`, index in dimension 0 of this tensor at which the view begins), or None if
        none of the tensor is there.
        """
        there = self.rows_in(first_row, first_row + (len(rows) if rows.ndim else rows.numel()))
        if there is None:
            return None
        if self.row is not None:
            row = rows[self.row - first_row]
            return (row if self.within is None else row[self.within[0] : self.within[1]]), 0
        if self.within is None:
            return rows, first_row
        begin = there[0] + self.within[0] - first_row
        return rows[begin : begin + there[1] - there[0]], there[0]

    def rows_in(self, first_row: int, end_row: int) -> tuple[int, int] | None:
        """(first, end) in dimension 0 of the part of this tensor among some rows of the parameter, or None.

        `first_row`, `end_row`: of the parameter.
        """
        if self.row is not None:
            return (0, self.shape[0]) if first_row <= self.row < end_row else None
        begin, end = self.within or (first_row, end_row)
        first, last = max(begin, first_row), min(end, end_row)
        if first >= last:
            return None
        return (first, last) if self.within is None else (first - begin, last - begin)

    def whole_in(self, param: Tensor) -> Tensor:
        """This tensor as a view of the whole parameter."""
        part = self.part_in(param, first_row=0)
        assert part is not None, f"{self.name} is not in a parameter of shape {list(param.shape)}"
        return part[0]


def hf_tensors(model: nn.Module) -> list[HfTensor]:
    """The checkpoint's tensors of a transformers model, in the order of its parameters; tied weights once.

    `model`: may be on the meta device, and sharded. How it was loaded does not matter: the names are those
    that `save_pretrained` gives a model that was made from its configuration.
    Left out are the tensors that are never trained (`untrained.py`).
    Raises ConfigError for an architecture whose checkpoint has tensors that are not parts of parameters.
    """
    base = [(name, param.shape) for name, param in model.named_parameters() if not is_adapter(name)]
    params = {_without_adapter(name): name for name, _ in base}
    shapes = {_without_adapter(name): tuple(shape) for name, shape in base}
    conversions = _conversions(model)
    if not conversions:
        return [HfTensor(name=name, shape=shape, param=params[name]) for name, shape in shapes.items()]
    positions = _Positions(model, shapes)
    places: dict[str, tuple[int, HfTensor]] = {}
    for batch in positions.batches():
        for name, found in _to_checkpoint(model, conversions, batch).items():
            if name in places:
                raise positions.refusal(name)
            places[name] = positions.place(name, found)
    ordered = sorted(places.values(), key=lambda place: place[0])
    tensors = [replace(tensor, param=params[tensor.param]) for _, tensor in ordered]
    covered = sum(math.prod(tensor.shape) for tensor in tensors)
    assert covered == sum(map(math.prod, shapes.values())), "a parameter has no place in the checkpoint"
    return tensors


ADAPTER = "default"
"""PEFT's name of the adapter that is trained, which is part of its parameters' names."""
_ADAPTER_NAME = re.compile(rf"\.(lora_[AB])\.{ADAPTER}\.weight$")


def is_adapter(name: str) -> bool:
    """True for the name of a parameter of a LoRA adapter, as PEFT gives it."""
    return _ADAPTER_NAME.search(name) is not None


def _without_adapter(name: str) -> str:
    """The name that a parameter of the base had before PEFT put an adapter around its layer."""
    return name.replace(".base_layer.", ".")


def adapter_tensors(model: nn.Module) -> list[HfTensor]:
    """The tensors of a model's LoRA adapter under the names of PEFT's files, in the order of the model's
    layers, A [rank, in] before B [out, rank]; empty for a model without one.

    `model`: a transformers model with an adapter; it may be on the meta device, and sharded. Each tensor is
    one whole parameter.
    """
    return [
        HfTensor(
            name=PEFT_PREFIX + _ADAPTER_NAME.sub(r".\1.weight", name), shape=tuple(param.shape), param=name
        )
        for name, param in model.named_parameters()
        if is_adapter(name)
    ]


class _Positions:
    """Placeholders for the parameters: int64 tensors of their shapes with the last dimension shortened.

    The value of each element is its position among the elements of all parameters, so that a converted tensor
    shows which parameter its elements come from, and from which position.
    """

    def __init__(self, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
        self._architecture = type(model).__name__
        self._names = list(shapes)
        self._shapes = list(shapes.values())
        self._short = [(*shape[:-1], _COLUMNS) if len(shape) > 1 else shape for shape in self._shapes]
        self._starts = [0]
        for shape in self._short:
            self._starts.append(self._starts[-1] + math.prod(shape))

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The placeholders by the parameters' names, in batches."""
        batch: dict[str, Tensor] = {}
        room = _BATCH_POSITIONS
        for name, shape, start in zip(self._names, self._short, self._starts, strict=False):
            if batch and math.prod(shape) > room:
                yield batch
                batch, room = {}, _BATCH_POSITIONS
            batch[name] = torch.arange(start, start + math.prod(shape)).view(shape)
            room -= math.prod(shape)
        yield batch

    def place(self, name: str, found: Tensor) -> tuple[int, HfTensor]:
        """(position of the first element, the tensor); raises ConfigError if it is not a block of rows."""
        size = found.numel()
        start = int(found.flatten()[0])
        index = bisect.bisect_right(self._starts, start) - 1
        shape, short, param = self._shapes[index], self._short[index], self._names[index]
        if start + size > self._starts[index + 1] or not torch.equal(
            found.flatten(), torch.arange(start, start + size)
        ):
            raise self.refusal(name)
        first = start - self._starts[index]
        if found.shape == short:
            return start, HfTensor(name=name, shape=shape, param=param)
        row, first_in_row = divmod(first, math.prod(short[1:]))
        if not first_in_row and found.shape == short[1:]:
            return start, HfTensor(name=name, shape=shape[1:], param=param, row=row)
        if not first_in_row and found.shape[1:] == short[1:]:
            within = (row, row + len(found))
            return start, HfTensor(name=name, shape=(len(found), *shape[1:]), param=param, within=within)
        first_within, rest = divmod(first_in_row, math.prod(short[2:]))
        if rest or len(short) < 3 or found.shape[1:] != short[2:] or first_within + len(found) > short[1]:
            raise self.refusal(name)
        return start, HfTensor(
            name=name,
            shape=(len(found), *shape[2:]),
            param=param,
            row=row,
            within=(first_within, first_within + len(found)),
        )

    def refusal(self, name: str) -> ConfigError:
        """The error for a tensor that is not a block of rows of one parameter."""
        return ConfigError(
            f"{self._architecture}: transformers makes {name} of its checkpoint from the parameters in a way "
            "that pushes and checkpoints cannot follow (it transposes, interleaves or joins them); choose "
            "another model"
        )


def _conversions(model: Any) -> list[Any]:
    """transformers' conversions of a model that was made from its configuration.

    A model that was loaded also has the conversions that its files needed (old names, an additional prefix),
    and an engine may have loaded other files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in found if not isinstance(conversion, PrefixChange)]


def _to_checkpoint(model: Any, conversions: list[Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's names -> tensors of the checkpoint, as `save_pretrained` would write them.

    Raises ConfigError if transformers cannot convert them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    has_own = hasattr(model, "_weight_conversions")
    own = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions
    try:
        converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{type(model).__name__}: the names of its checkpoint cannot be derived ({error}); "
            "choose another model"
        ) from error
    finally:
        if has_own:
            model._weight_conversions = own
        else:
            del model._weight_conversions
    return converted
