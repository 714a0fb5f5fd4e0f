"""Compares the weights of two Hugging Face directories, or the adapters of two PEFT directories."""

from __future__ import annotations

import filecmp
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from areal_like.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = "*model*.safetensors"
"""The weights of a model, or of its adapter."""
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
    if same_files(ours, theirs, _WEIGHTS):
        return None
    from trainer.models.safetensors_rows import SafetensorsRows  # imports torch: only if the files differ

    files = [sorted(folder.glob(_WEIGHTS)) for folder in (ours, theirs)]
    for folder, found in zip((ours, theirs), files, strict=True):
        if not found:
            raise ConfigError(f"{folder} has no weights: there is no {_WEIGHTS}")
    models = [SafetensorsRows(found, remedy="compare other runs") for found in files]
    names = [set(model.names) for model in models]
    if names[0] != names[1]:
        only = sorted(names[0] ^ names[1])
        return WeightsDifference(text=f"{only[0]} is in one model only", relative=math.inf)
    difference = norm = worst = 0.0
    num, worst_name = 0, ""
    for name in sorted(names[0]):
        shapes = [model.shape(name) for model in models]
        if shapes[0] != shapes[1]:
            text = f"shape of {name}: {shapes[0]} / {shapes[1]}"
            return WeightsDifference(text=text, relative=math.inf)
        square, of_ours = _squares(*(model.tensor(name) for model in models))
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


def _squares(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Sums of squares: of the difference, and of the first."""
    difference = norm = 0.0
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    for start in range(0, len(ours), _CHUNK):
        a, b = (tensor[start : start + _CHUNK].double() for tensor in (ours, theirs))
        difference += float((a - b).square().sum())
        norm += float(a.square().sum())
    # NaN is neither equal nor close to anything.
    return (math.inf if math.isnan(difference) else difference), norm
