"""The weights of a checkpoint in the Hugging Face layout, for engines and users; every rank writes its rows.

    model.safetensors                                            if all weights fit into one file
    model-00001-of-00002.safetensors ...                         else, with
    model.safetensors.index.json                                 the file of each tensor

Rank 0 makes the files with headers and final sizes; then each rank writes its rows at their places. So no
tensor is gathered, and the files are those that `save_pretrained` would write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from areal_like.weights.hf_layout import HfTensor
from trainer.checkpoints.safetensors_file import FileLayout, write_at
from trainer.models.safetensors_rows import INDEX_FILE, SINGLE_FILE

MAX_FILE_BYTES = 5_000_000_000
"""Largest file; a tensor that is larger than this gets a file of its own."""


class HfFiles:
    """The files of one model's weights."""

    def __init__(
        self, tensors: Sequence[HfTensor], dtype: torch.dtype, *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """`tensors`: all of the checkpoint. `dtype`: in the files."""
        self._dtype = dtype
        self._layouts: dict[str, FileLayout] = {}
        self._tensors: dict[str, list[HfTensor]] = {}
        """By file."""
        groups = _cut(tensors, dtype, max_file_bytes)
        for number, group in enumerate(groups, 1):
            name = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            shapes = {tensor.name: tensor.shape for tensor in sorted(group, key=lambda tensor: tensor.name)}
            self._layouts[name] = FileLayout.of(shapes, dtype)
            self._tensors[name] = group

    @property
    def names(self) -> list[str]:
        """The files with tensors."""
        return list(self._layouts)

    def create(self, directory: Path) -> None:
        """Makes the files and their index. On one rank, before any rank writes."""
        for name, layout in self._layouts.items():
            layout.create(directory / name)
        if len(self._layouts) > 1:
            file_of = {tensor.name: name for name, group in self._tensors.items() for tensor in group}
            num_bytes = sum(
                entry.num_bytes for layout in self._layouts.values() for entry in layout.entries.values()
            )
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(file_of.items()))}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write_rows(self, directory: Path, rows: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> None:
        """Writes this rank's rows of every parameter, and syncs the files.

        `rows`: by the parameter's name, on the CPU; `first_rows`: number of the first of them.
        """
        for name, layout in self._layouts.items():
            file = os.open(directory / name, os.O_WRONLY)
            try:
                for tensor in self._tensors[name]:
                    part = tensor.part_in(rows[tensor.param], first_row=first_rows[tensor.param])
                    if part is not None:
                        entry = layout.entries[tensor.name]
                        offset = entry.offset + part[1] * entry.row_bytes
                        write_at(file, part[0], dtype=self._dtype, offset=offset)
                os.fsync(file)
            finally:
                os.close(file)


def _cut(tensors: Sequence[HfTensor], dtype: torch.dtype, max_file_bytes: int) -> list[list[HfTensor]]:
    """Cuts the tensors, in order, into groups of at most `max_file_bytes`."""
    groups: list[list[HfTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if groups[-1] and num_bytes + size > max_file_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(tensor)
        num_bytes += size
    return groups
