"""The files of one model in a checkpoint: rows of its state, and for the policy its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from areal_like.weights.hf_layout import hf_tensors
from trainer.checkpoints.hf_files import HfFiles
from trainer.checkpoints.host_copy import MASTER, HostCopy, ModelState
from trainer.checkpoints.row_files import FOLDER, ModelRows, rows_of, write_rows
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.sharded_weights import row_range, shards_of


class ModelFiles:
    """What one rank writes of one model. It keeps the memory of its copy from checkpoint to checkpoint.

    take() on the training thread -> create() on rank 0 -> write() on every rank, in a thread
    """

    def __init__(
        self,
        name: str,
        model: PackedModel,
        optimizer: ModelState,
        ranks: Ranks,
        *,
        dtype: torch.dtype | None,
        max_file_bytes: int,
    ) -> None:
        """`name`: beginning of the row files' names. `dtype`: of the weights' files; None: there are none."""
        self._name = name
        self._model = model
        self._optimizer = optimizer
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._copy = HostCopy(model, optimizer)
        self._weights: HfFiles | None = None
        if dtype is not None:
            self._weights = HfFiles(hf_tensors(model.model), dtype, max_file_bytes=max_file_bytes)
        self._masters: Sequence[str] = ()
        if self._weights is not None and dtype == self._copy.dtype:
            self._masters = self._weights.names
        self._first_rows = {
            shard.name: row_range(shard.shape, rank=ranks.rank, world_size=ranks.world_size)[0]
            for shard in shards_of(model)
        }
        self.rows: ModelRows
        """Index of the row files of all ranks; set by `take`."""

    def is_of(self, optimizer: ModelState) -> bool:
        """True if `take` copies the state of this optimizer and its model."""
        return self._optimizer is optimizer

    def take(self) -> None:
        """Copies the present state, while nothing is being written."""
        self._copy.take()
        self.rows = rows_of(
            self._model,
            self._copy,
            name=self._name,
            world_size=self._world_size,
            masters=self._masters,
        )

    def create(self, directory: Path) -> None:
        """Makes the files that all ranks write."""
        if self._weights is not None:
            self._weights.create(directory)

    def write(self, directory: Path) -> None:
        """Writes and syncs this rank's rows. Raises OSError."""
        write_rows(directory / FOLDER, self.rows, self._copy, rank=self._rank)
        if self._weights is not None:
            self._weights.write_rows(directory, self._copy.values[MASTER], self._first_rows)
