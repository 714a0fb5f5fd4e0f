"""Adam's moments on the host: the same updates bit by bit, in checkpoints too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.trainer_helpers import write_model
from trainer import optimizer as optimizer_module
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.optimizer import ShardedAdamW

NUM_STEPS = 4


def updated(path: str, *, offload: bool, resumed_at: int = NUM_STEPS) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and moments after NUM_STEPS updates with gradients that depend on the step alone; the moments
    are moved into a new optimizer before update `resumed_at`, as a checkpoint does."""
    policy = Policy.load(path, Ranks.alone())
    on_host: list[Tensor] = []

    def to_host(tensor: Tensor) -> Tensor:
        on_host.append(optimizer_module.host_copy(tensor))
        return on_host[-1]

    def new() -> ShardedAdamW:
        return ShardedAdamW(
            policy, Ranks.alone(), lr=1e-2, weight_decay=0.1, offload=offload, to_host=to_host
        )

    adam = new()
    for step in range(NUM_STEPS):
        if step == resumed_at:
            before = {name: adam.moments(name) for name in adam.shards}
            adam, num_updates = new(), adam.num_updates
            for name, moments in adam.new_moments(num_updates=num_updates).items():
                for key, moment in moments.items():
                    moment.copy_(before[name][key])
        generator = torch.Generator().manual_seed(step)
        for param in policy.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        adam.step(divisor=2.0, lr=1e-2)
    assert adam.num_updates == NUM_STEPS
    moments = [value for name in adam.shards for value in adam.moments(name).values()]
    if offload:
        own = {each.data_ptr() for each in on_host}
        assert all(value.data_ptr() in own for value in moments), "allocated once, and written in place"
    return [param.detach() for param in policy.parameters()], moments


@pytest.mark.parametrize("part_bytes", [1, 10_000, 1 << 30])
def test_updates_are_those_on_the_device(
    tmp_path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, dtype=torch.float32)
    want = updated(path, offload=False)
    monkeypatch.setattr(optimizer_module, "_PART_BYTES", part_bytes)
    for resumed_at in (NUM_STEPS, 2):
        found = updated(path, offload=True, resumed_at=resumed_at)
        for ours, theirs in zip(found, want, strict=True):
            assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
