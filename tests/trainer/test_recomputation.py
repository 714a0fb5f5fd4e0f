"""Recomputed layers: the same bits as without recomputation, less work, and inputs on the host."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from tests.support.families import BODY, write_family
from tests.support.trainer_helpers import random_groups, run_ranks, write_model
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models import recomputation
from trainer.models.policy import Policy

KINDS: tuple[Any, ...] = (True, "selective")
NUM_LAYERS = 2


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **kwargs or {})


def trained(path: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """Log-probs and gradients of a micro-batch in float32, and the operations of its backward."""
    policy = Policy.load(path, Ranks.alone(), **settings)
    trajectories = [t for group in random_groups(3) for t in group]
    batch = collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])
    logp_S = policy(batch).logprobs_S
    with Operations() as operations:
        (logp_S * torch.linspace(-1, 1, len(logp_S))).sum().backward()
    found = {name: param.grad for name, param in policy.model.named_parameters() if param.grad is not None}
    return logp_S.detach(), found, operations.counts  # type: ignore[return-value]


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "qwen3",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3_moe", "qwen3_5_text")),
    ],
)
def test_gradients_are_those_without_recomputation(architecture: str, tmp_path: Path) -> None:
    """Bit by bit, also with the layers' inputs on the host."""
    is_simple = architecture in ("llama", "qwen3")
    path = (
        write_model(tmp_path, architecture, dtype=torch.float32)
        if is_simple
        else write_family(architecture, tmp_path)
    )
    logp_S, want, plain = trained(path)
    counts = {}
    for kind in KINDS:
        for offload in (False, True):
            got_S, found, counts[kind] = trained(
                path, gradient_checkpointing=kind, offload_activations=offload
            )
            assert torch.equal(got_S, logp_S) and found.keys() == want.keys()
            for name, grad in want.items():
                assert torch.equal(found[name], grad), name
    if is_simple:
        # Recomputed: q, k, v, o, gate and up; down's output is not needed. Kept: k, o and up.
        assert counts[True]["aten::mm"] - plain["aten::mm"] == 6 * NUM_LAYERS
        assert counts["selective"]["aten::mm"] - plain["aten::mm"] == 3 * NUM_LAYERS
        attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
        assert counts[True][attention] >= NUM_LAYERS and not counts["selective"][attention]


@pytest.mark.parametrize("family", ["opt", "seed_oss"])
def test_recomputed_layers_have_no_dropout(family: str, tmp_path: Path) -> None:
    """These call dropout as a function, opt in the layer itself and seed_oss in a module of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **BODY)
    assert config.dropout if family == "opt" else config.residual_dropout
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    logp_S, want, _ = trained(str(tmp_path))
    got_S, found, _ = trained(str(tmp_path), gradient_checkpointing=True)
    assert torch.equal(got_S, logp_S) and found.keys() == want.keys()
    assert all(torch.equal(found[name], grad) for name, grad in want.items())


@pytest.mark.long
def test_ranks_compute_what_one_rank_computes(tmp_path: Path) -> None:
    """FSDP2 gathers within the recomputed function; a model of a size whose layers are sharded apart."""
    path = write_model(tmp_path / "model", "qwen3", dtype=torch.float32)
    run_ranks("recomputation", str(tmp_path), path, world_size=2, module="tests.support.recomputation_ranks")
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {"equal": True, "apart": True}


def test_layer_inputs_are_saved_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor for each layer, [1, rows, hidden], read once in the order of the backward."""
    saved: list[Tensor] = []
    read: list[int] = []
    to_host, to_device = recomputation._to_host, recomputation._to_device

    def saving(tensor: Tensor) -> Any:
        found = to_host(tensor)
        saved.append(found[1])
        assert found[1].data_ptr() != tensor.data_ptr() and torch.equal(found[1], tensor)
        return found

    def reading(packed: Any) -> Tensor:
        read.extend(index for index, tensor in enumerate(saved) if tensor is packed[1])
        return to_device(packed)

    monkeypatch.setattr(recomputation, "_to_host", saving)
    monkeypatch.setattr(recomputation, "_to_device", reading)
    path = write_model(tmp_path, dtype=torch.float32)
    trained(path, gradient_checkpointing="selective", offload_activations=True)
    assert [tensor.dim() for tensor in saved] == [3] * NUM_LAYERS and read == [1, 0]
    assert {tensor.shape[-1] for tensor in saved} == {32}


def test_offload_needs_recomputed_layers() -> None:
    settings = {"gradient_checkpointing": False, "offload_activations": True}
    with pytest.raises(ConfigError, match=r"set trainer\.gradient_checkpointing to true, selective or auto"):
        from_mapping({"trainer": settings})
