"""Micro-batches in step on all ranks: FSDP2's collectives match only if every rank runs as many as the others.

Before each one the ranks ask whether anybody has any left; who has none runs a dummy, which must count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import MicroBatch, PackedBatch, Sample, collate
from trainer.distributed.ranks import Ranks


def matched(packs: Iterator[MicroBatch], ranks: Ranks) -> Iterator[tuple[PackedBatch, bool]]:
    """(micro-batch, True), or (dummy, False) while only other ranks have any left. Collective."""
    while True:
        pack = next(packs, None)
        if not ranks.any(pack is not None):
            return
        if pack is None:
            yield collate([_DUMMY], device=ranks.device), False
        else:
            yield collate(pack, device=ranks.device), True


_DUMMY = Sample(
    trajectory=Trajectory(
        tokens=np.zeros(2, dtype=np.int32),
        loss_mask=np.array([0, 1], dtype=np.uint8),
        logprobs=np.zeros(2, dtype=np.float32),
        versions=np.array([-1, 0], dtype=np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    ),
    advantage=0.0,
    group=0,
)
"""What a rank without data runs."""
