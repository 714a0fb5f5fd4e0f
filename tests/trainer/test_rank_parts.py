"""How the buckets of a push divide among ranks: every row once, experts whole, no padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from areal_like.weights.buckets import flatten, unflatten
from areal_like.weights.hf_layout import HfTensor, hf_tensors
from trainer.weights import push_source
from trainer.weights.push_source import OwnWeights
from trainer.weights.snapshot import PushLayout

EXPERTS = 5


class Fused(nn.Module):
    """A weight, a bias, a joined weight, and the fused experts of a layer: [experts, gate | up, columns]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(7, 3))
        self.bias = nn.Parameter(torch.randn(3))
        self.joined = nn.Parameter(torch.randn(7, 3))
        self.experts = nn.Parameter(torch.randn(EXPERTS, 4, 3))


def tensors_of(model: nn.Module) -> list[HfTensor]:
    experts = [
        HfTensor(name=f"{e}.{name}", shape=(2, 3), param="experts", row=e, within=within)
        for e in range(EXPERTS)
        for name, within in (("gate", (0, 2)), ("up", (2, 4)))
    ]
    joined = [
        HfTensor(name=name, shape=(end - first, 3), param="joined", within=(first, end))
        for name, first, end in (("first", 0, 4), ("second", 4, 7))
    ]
    whole = [tensor for tensor in hf_tensors(model) if tensor.param in ("weight", "bias")]
    return [*whole, *joined, *experts]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_row_lies_on_one_rank(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    model = Fused()
    expected = {"weight": model.weight, "bias": model.bias}
    expected |= {"first": model.joined[:4], "second": model.joined[4:]}
    for e in range(EXPERTS):
        expected |= {f"{e}.gate": model.experts[e, :2], f"{e}.up": model.experts[e, 2:]}

    def rows_of(param: torch.Tensor) -> torch.Tensor:
        """The rows that FSDP2 gives the rank."""
        num_rows = -(-len(param) // world_size)
        return param[rank * num_rows : (rank + 1) * num_rows]

    monkeypatch.setattr(push_source, "local", rows_of)
    layouts = []
    for rank in range(world_size):
        layouts.append(
            PushLayout(
                model,
                source=OwnWeights(model, tensors_of(model)),
                rank=rank,
                world_size=world_size,
                bucket_bytes=50,
                dtype="bfloat16",
            )
        )
    assert len(layouts[0].buckets) > 3
    num_bytes = 0
    for index, parts in enumerate(layouts[0].buckets):
        bucket = parts.bucket
        gathered = []
        for layout in layouts:
            own = torch.empty(layout.own[index].num_bytes, dtype=torch.uint8)
            layout.copy_own(index, own)
            gathered.append(own)
        whole = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        parts.assemble(torch.cat(gathered), into=whole)
        want = flatten(bucket, expected)
        assert torch.equal(whole, want)
        assert unflatten(bucket, whole).keys() == {spec.name for spec in bucket.tensors}
        assert parts.num_bytes - bucket.num_bytes < 8 * world_size, "ranks without rows send nothing"
        num_bytes += bucket.num_bytes
    assert num_bytes == 2 * (2 * 7 * 3 + EXPERTS * 4 * 3 + 3)
