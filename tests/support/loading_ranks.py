"""Ranks that load a model by rows and measure their memory, run by `run_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

# Imported before the ranks are forked: an import takes longer than a check.
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

from tests.support.memory import peak, release_freed_memory, reset_peak
from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import main
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local, reshard, row_range
from trainer.models.policy import Policy
from trainer.models.safetensors_rows import SafetensorsRows
from trainer.models.value_model import ValueModel

SLACK_BYTES = 16 << 20
"""8 MiB of mapped files, and room for the Python objects of a model and for the allocator."""


def loading(ranks: Ranks, _: Path, large: str, small: str) -> None:
    """All checks, in one set of processes."""
    frozen_and_critic(ranks, small)
    memory(ranks, large, small)


def memory(ranks: Ranks, large: str, small: str) -> None:
    """Loads the small model, so that everything is imported, then the large one, and checks the peak."""
    Policy.load(small, ranks)
    release_freed_memory()
    source = SafetensorsRows.of_model(large)
    sizes = [4 * torch.Size(source.shape(name)).numel() for name in source.names]
    bound = sum(sizes) / ranks.world_size + max(sizes) + SLACK_BYTES

    start = reset_peak()
    policy = Policy.load(large, ranks)
    used = peak() - start
    assert used < bound, f"rank {ranks.rank}: {used >> 20} MiB and not {int(bound) >> 20}"
    for name, param in policy.model.named_parameters():
        first, end = row_range(param.shape, rank=ranks.rank, world_size=ranks.world_size)
        with safe_open(source.file_of(name), framework="pt") as file:
            assert torch.equal(local(param.detach()), file.get_slice(name)[first:end].float()), name
    del policy, param

    ranks.meet()
    if ranks.rank == 0:  # a whole model does not stay below the bound
        start = reset_peak()
        model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.float32)
        assert peak() - start > bound
        del model
    ranks.meet()


def frozen_and_critic(ranks: Ranks, path: str) -> None:
    """A frozen reference has the policy's log-probs and half its memory; the critic has the model's body."""
    trajectories = [t for group in random_groups(3) for t in group]
    batch = collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])
    policy = Policy.load(path, ranks, dtype="bfloat16")
    reference = Policy.load(path, ranks, dtype="bfloat16", frozen=True, reshard_after_forward=False)
    with torch.no_grad():
        assert torch.equal(policy(batch).logprobs_S, reference(batch).logprobs_S)
    for name, param in reference.named_parameters():
        assert isinstance(param, DTensor) and not param.requires_grad, f"{name} was not resharded"
        assert param.dtype == torch.bfloat16
    exact = Policy.load(path, ranks, frozen=True, master_dtype=torch.float64)
    assert {param.dtype for param in exact.parameters()} == {torch.float64}

    grads = []
    for reshards in (True, False):
        trained = Policy.load(path, ranks, reshard_after_forward=reshards)
        trained(batch).logprobs_S.sum().backward()
        grads.append({name: local(param.grad) for name, param in trained.named_parameters()})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())

    critic = ValueModel.load(path, ranks)
    reshard(policy)
    body = dict(policy.model.base_model.named_parameters())
    for name, param in critic.model.base_model.named_parameters():
        assert torch.equal(local(param), local(body[name])), name
    head: Any = critic.model.get_output_embeddings()
    assert not local(head.weight).any() and not local(head.bias).any()
    assert not critic(batch).any()


if __name__ == "__main__":
    main(loading=loading)
