"""Ranks that compare gradients with and without recomputation; the processes of `test_recomputation.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import main
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models import packed_model
from trainer.models.packed_model import decoder_layers
from trainer.models.policy import Policy


def recomputation(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Writes to `rank-N.json` whether all ways to recompute give equal gradients in two micro-batches."""
    packed_model.SMALLEST_SHARDED_APART = 0
    trajectories = [t for group in random_groups(3, seed=ranks.rank) for t in group]
    batch = collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])

    def gradients(**settings: Any) -> list[torch.Tensor]:
        policy = Policy.load(path, ranks, **settings)
        for _ in range(2):
            policy(batch).logprobs_S.sum().backward()
        is_apart.append(all(isinstance(layer, FSDPModule) for layer in decoder_layers(policy.model)))
        return [local(param.grad) for param in policy.parameters() if param.grad is not None]

    is_apart: list[bool] = []
    want = gradients()
    is_equal = len(want) > 0
    for kind in (True, "selective"):
        for offload in (False, True):
            found = gradients(gradient_checkpointing=kind, offload_activations=offload)
            is_equal &= len(found) == len(want) and all(map(torch.equal, found, want))
    (out_dir / f"rank-{ranks.rank}.json").write_text(json.dumps({"equal": is_equal, "apart": all(is_apart)}))


if __name__ == "__main__":
    main(recomputation=recomputation)
