"""Compares the weights of two Hugging Face directories, without torch."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "|u1", "I64": "<i8", "I32": "<i4"}
"""Dtype of safetensors -> dtype of numpy, which lacks bfloat16."""
_LENGTH_BYTES = 8
_CHUNK = 1 << 22
"""Number of elements that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class WeightsDifference:
    """The difference of two models' weights."""

    text: str
    relative: float
    """Norm of the difference over the norm of the first; infinite if tensors or shapes do not match."""


def same_files(ours: Path, theirs: Path, pattern: str) -> bool | None:
    """True if the files of a pattern are equal to the last bit; None if neither has any."""
    names = [{file.relative_to(folder) for file in folder.glob(pattern)} for folder in (ours, theirs)]
    if not names[0] and not names[1]:
        return None
    return names[0] == names[1] and all(
        filecmp.cmp(ours / name, theirs / name, shallow=False) for name in names[0]
    )


def compare_weights(ours: Path, theirs: Path) -> WeightsDifference | None:
    """Compares the weights in two directories; returns None if they are equal to the last bit. Raises
    ConfigError."""
    if same_files(ours, theirs, "model*.safetensors"):
        return None
    models = _Tensors(ours), _Tensors(theirs)
    names = [model.places.keys() for model in models]
    if names[0] != names[1]:
        only = sorted(names[0] ^ names[1])
        return WeightsDifference(text=f"{only[0]} is in one model only", relative=math.inf)
    difference = norm = worst = 0.0
    num, worst_name = 0, ""
    for name in sorted(names[0]):
        shapes = [model.places[name].shape for model in models]
        if shapes[0] != shapes[1]:
            text = f"shape of {name}: {shapes[0]} / {shapes[1]}"
            return WeightsDifference(text=text, relative=math.inf)
        square, of_ours = _squares(models[0].flat(name), models[1].flat(name))
        difference, norm = difference + square, norm + of_ours
        num += square > 0
        share = math.sqrt(square / of_ours) if of_ours else math.inf if square else 0.0
        if share > worst:
            worst, worst_name = share, name
    if not num:
        return None
    relative = math.sqrt(difference / norm) if norm else math.inf
    text = (
        f"{num} of {len(names[0])} tensors differ, by {relative:.3g} of the weights' norm; "
        f"most {worst_name}, by {worst:.3g}"
    )
    return WeightsDifference(text=text, relative=relative)


def _squares(ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[float, float]:
    """Sums of squares: of the difference, and of the first."""
    difference = norm = 0.0
    for start in range(0, len(ours), _CHUNK):
        a, b = (_floats(array[start : start + _CHUNK]) for array in (ours, theirs))
        difference += float(np.square(a - b).sum())
        norm += float(np.square(a).sum())
    # NaN is neither equal nor close to anything.
    return (math.inf if math.isnan(difference) else difference), norm


def _floats(array: NDArray[Any]) -> NDArray[np.float64]:
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class _Place:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Tensors:
    """The tensors of a directory's `model*.safetensors`, read on demand."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, _Place] = {}
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} has no weights: there is no model*.safetensors")
        for file in files:
            try:
                with file.open("rb") as opened:
                    num_bytes = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
                    if num_bytes > file.stat().st_size:
                        raise ValueError("its header is cut short")
                    header: Mapping[str, Any] = json.loads(opened.read(num_bytes))
                for name, entry in header.items():
                    if name != "__metadata__":
                        self.places[name] = _Place(
                            file=file,
                            dtype=_DTYPES[entry["dtype"]],
                            shape=tuple(entry["shape"]),
                            offset=_LENGTH_BYTES + num_bytes + entry["data_offsets"][0],
                        )
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{file} cannot be read ({error!r})") from None

    def flat(self, name: str) -> NDArray[Any]:
        place = self.places[name]
        num = math.prod(place.shape)
        try:
            return np.memmap(place.file, place.dtype, "r", place.offset, (num,)) if num else np.zeros(0)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{place.file} cannot be read ({error})") from None
