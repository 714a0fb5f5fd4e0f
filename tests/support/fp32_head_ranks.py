"""Ranks of a trainer in bfloat16 with `model.fp32_head`, run by `run_ranks`: `gradient STORE WORLD_SIZE OUT
MODEL`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import main
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, local, shards_of
from trainer.models.policy import Policy

CHUNK_TOKENS = 5


def load_policy(path: str, ranks: Ranks) -> Policy:
    """A policy whose head runs over several chunks of each batch."""
    return Policy.load(path, ranks, dtype="bfloat16", chunk_tokens=CHUNK_TOKENS, fp32_head=True)


def batch_of(rank: int) -> PackedBatch:
    """The sequences of one rank."""
    group = random_groups(2, group_size=6)[rank]
    return collate([TrainingSample(trajectory=each, advantage=1.0, group=0) for each in group])


def whole_gradient(policy: Policy) -> dict[str, Tensor]:
    """Gradients by name, unsharded, on rank 0. Collective."""
    grads = [local(param.grad) for param in policy.parameters() if param.grad is not None]
    return dict(gather([replace(s, rows=rows) for s, rows in zip(shards_of(policy), grads, strict=True)]))


def gradient(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Each rank runs its own sequences; rank 0 writes the gradient."""
    policy = load_policy(path, ranks)
    policy(batch_of(ranks.rank)).logprobs_S.sum().backward()
    found = whole_gradient(policy)
    if ranks.rank == 0:
        save_file({name: grad.contiguous() for name, grad in found.items()}, out_dir / "gradient.safetensors")


if __name__ == "__main__":
    main(gradient=gradient)
