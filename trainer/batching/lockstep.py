"""Runs equal numbers of micro-batches on all ranks, because FSDP2's collectives hang if one rank runs fewer.

Before each micro-batch an all-reduce tells every rank if any rank has a micro-batch left. A rank that has
none left runs a dummy micro-batch, whose contribution the caller multiplies by zero. The same all-reduce
tells if one of them abandons the step (`Ranks.abandonable`), so that all stop between the same two.

A micro-batch is requested only after the caller has received the previous one, so none waits for its
successor. On a GPU it is nevertheless prepared and copied while the previous one runs (`device_copies.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import MicroBatch, PackedBatch, TrainingSample, collate
from trainer.distributed.ranks import Ranks


def in_lockstep(
    microbatches: Iterable[MicroBatch], ranks: Ranks, *, shares_prefixes: bool = True
) -> Iterator[tuple[PackedBatch, bool]]:
    """Yields (batch, live): this rank's micro-batches with live=True, then dummies with live=False.

    `shares_prefixes`: see `collate`.

    Dummies follow for as long as another rank still has micro-batches. Collective. Raises
    IncompleteStepError on every rank if one abandons the step.
    """
    remaining = iter(microbatches)
    while True:
        microbatch = next(remaining, None)
        if not ranks.any_left(microbatch is not None):
            return
        ranks.place.next_microbatch()
        if microbatch is None:
            yield collate([_DUMMY], device=ranks.device), False
        else:
            yield collate(microbatch, device=ranks.device, shares_prefixes=shares_prefixes), True


_DUMMY = TrainingSample(
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
"""The shortest trajectory with one sampled token."""
