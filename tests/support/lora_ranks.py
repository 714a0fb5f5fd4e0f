"""Ranks of a real trainer with adapters, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR MODEL`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from areal_like.config import LoraConfig
from areal_like.weights.buckets import unflatten
from areal_like.weights.hf_layout import adapter_tensors
from tests.support.trainer_helpers import flattened, random_groups, without_measured
from tests.support.trainer_ranks import main, make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import RowShard, gather, local
from trainer.models import packed_model
from trainer.models.policy import Policy
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, WeightSnapshotter

LORA = LoraConfig(rank=3, alpha=12.0)
"""The rank is odd, so that two ranks hold unequal shards of A."""
METHODS = {
    "critic": {"advantage": {"name": "gae", "critic_updates": 2}},
    "reference": {"kl": {"coef": 0.1, "place": "loss"}},
    "proximal": {"objective": {"name": "decoupled_ppo", "prox": "average"}},
}


def adapter_shards(model: nn.Module) -> list[RowShard]:
    """This rank's rows of a transformers model's adapter under PEFT's names, sharing memory."""
    params = dict(model.named_parameters())
    return [RowShard.of(tensor.name, params[tensor.param]) for tensor in adapter_tensors(model)]


def adapter_of(policy: Policy) -> dict[str, Tensor]:
    """The whole adapter under PEFT's names, on rank 0. Collective."""
    return {name: tensor.clone() for name, tensor in gather(adapter_shards(policy.model))}


def pushed(
    policy: Policy,
    ranks: Ranks,
    *,
    dtype: str = "float32",
    kind: type[WeightSnapshotter] = BackgroundGather,
) -> dict[str, Tensor]:
    """All tensors of one push, on rank 0. Collective."""
    snapshotter = kind(policy, ranks, bucket_bytes=4096, dtype=dtype)
    snapshot = snapshotter.take_snapshot()
    found: dict[str, Tensor] = {}
    if snapshot is not None:
        assert snapshot.acquire()
        for index, bucket in enumerate(snapshot.buckets):
            tensors = unflatten(bucket, snapshot.read(index).data)
            found |= {name: tensor.clone() for name, tensor in tensors.items()}
        snapshot.release()
    snapshotter.close()
    return found


def steps(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Trains two steps with each method; writes adapter, pushes and metrics. In `layers` each layer is
    sharded apart, and the embedding, which has no adapter."""
    for name, settings in {"plain": {}, **METHODS, "layers": {}}.items():
        packed_model.SMALLEST_SHARDED_APART = 0 if name == "layers" else 1 << 30
        runner = make_runner(path, ranks, dtype=torch.float32, lora=LORA, settings=settings)
        for step in range(2):
            groups = random_groups(4, seed=step)
            metrics = runner.run(groups[ranks.rank :: ranks.world_size], step=step)
        found = adapter_of(runner.policy)
        if runner.critic is not None:
            found |= {
                f"critic.{key}": value for key, value in gather(adapter_shards(runner.critic.model.model))
            }
        for kind in (BackgroundGather, BoundaryGather):
            found |= {
                f"{kind.__name__}.{key}": value
                for key, value in pushed(runner.policy, ranks, kind=kind).items()
            }
        if ranks.rank == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, out_dir / f"{name}.safetensors")
            (out_dir / f"{name}.json").write_text(json.dumps(flattened(without_measured(metrics))))


def narrow(ranks: Ranks, out_dir: Path, path: str) -> None:
    """One backward in bfloat16, with layers sharded apart: gradients of the float32 matrices; writes them."""
    packed_model.SMALLEST_SHARDED_APART = 0
    for dtype in ("float32", "bfloat16"):
        policy = Policy.load(path, ranks, dtype=dtype, lora_settings=LORA)
        samples = [
            TrainingSample(trajectory=t, advantage=0.0, group=0)
            for group in random_groups(4)[ranks.rank :: ranks.world_size]
            for t in group
        ]
        policy(collate(samples)).logprobs_S.sum().backward()
        gradients = []
        for name, param in policy.named_parameters():
            assert (param.grad is not None) == param.requires_grad, name
            if param.grad is not None:
                assert param.dtype == param.grad.dtype == torch.float32
                gradients.append(RowShard.of(name, param, local(param.grad)))
        found = dict(gather(gradients))
        if ranks.rank == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, out_dir / f"{dtype}.safetensors")


def resume(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Loads the checkpoint of step 2, trains step 3, saves it."""
    runner = make_runner(path, ranks, dtype=torch.float32, lora=LORA, has_weights=False)
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    checkpoints.load(2, ranks=ranks, **runner.saved)
    runner.run(random_groups(4, seed=2)[ranks.rank :: ranks.world_size], step=2)
    checkpoints.save(3, ranks=ranks, extra={}, **runner.saved)
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint


if __name__ == "__main__":
    main(steps=steps, narrow=narrow, resume=resume)
