"""Ranks that train, push and save a model of any family; the processes of `test_families.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.snapshot_ranks import received
from tests.support.trainer_helpers import joined, random_groups
from tests.support.trainer_ranks import main, make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, local, shards_of
from trainer.models import packed_model
from trainer.models.policy import Policy
from trainer.step.runner import StepRunner
from trainer.weights.snapshot import BackgroundGather, BoundaryGather

NUM_STEPS = 2


def groups_of(step: int) -> list[list[Trajectory]]:
    """Groups with a common prompt, one sample of several segments, and one sequence longer than a chunk of
    the delta rule (64 tokens)."""
    groups = random_groups(4, seed=step, prompt=6)
    groups[1][0] = joined(groups[1])
    long = random_groups(1, seed=step, group_size=9, longest=90)[0]
    groups[2].insert(0, max(long, key=lambda t: t.num_tokens))
    return groups


def owned(step: int, rank: int, world_size: int) -> list[list[Trajectory]]:
    """A rank's groups of a step. Of two ranks the second has one, so it runs dummies."""
    groups = groups_of(step)
    return groups if world_size == 1 else (groups[:3], groups[3:])[rank]


def measured(step: int, rank: int, world_size: int) -> list[Trajectory]:
    """The trajectories of `owned`."""
    return [trajectory for group in owned(step, rank, world_size) for trajectory in group]


def steps(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Two steps: before each, log-probs of every rank's tokens, their summed gradient and the weights; then
    a push and a checkpoint."""
    runner = make_runner(path, ranks, dtype=torch.float32, budget_tokens=120, checkpointing=True)
    for step in range(NUM_STEPS):
        _measure(runner.policy, ranks, out_dir, step)
        runner.run(owned(step, ranks.rank, ranks.world_size), step=step)
    _write(ranks, out_dir / "trained.safetensors", dict(gather_full_state(runner.policy)))
    for kind in (BackgroundGather, BoundaryGather):
        snapshotter = kind(runner.policy, ranks, bucket_bytes=5000, dtype="float32")
        snapshot = snapshotter.take_snapshot()
        if snapshot is not None:
            assert snapshot.acquire()
            _write(ranks, out_dir / f"{kind.__name__}.safetensors", received(snapshot))
            snapshot.release()
        snapshotter.close()
    _save(runner, ranks, out_dir, path)
    _narrow(ranks, path)


def _narrow(ranks: Ranks, path: str) -> None:
    """In bfloat16, with layers sharded one by one: each layer of linear attention has its exact vectors."""
    packed_model.SMALLEST_SHARDED_APART = 0
    policy = Policy.load(path, ranks, dtype="bfloat16")
    stored = load_file(Path(path) / "model.safetensors")
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in measured(0, ranks.rank, 1)]
    batch = collate(samples, shares_prefixes=policy.shares_prefixes)
    with torch.no_grad():
        want_S = Policy.load(path, ranks)(batch).logprobs_S
    got_S = policy(batch).logprobs_S
    assert float((got_S.detach() - want_S).abs().max()) < 0.2
    for layer in policy.linear_layers:
        prefix = f"model.layers.{layer.layer.layer_idx}.linear_attn."
        assert layer.exact.keys() == {"A_log", "dt_bias", "norm.weight"}
        assert all(torch.equal(value, stored[prefix + name]) for name, value in layer.exact.items())
    got_S.sum().backward()  # type: ignore[no-untyped-call]
    for name, param in policy.named_parameters():
        assert param.grad is not None and param.grad.dtype == torch.float32, name
        assert bool(local(param.grad).isfinite().all()), name


def resume(ranks: Ranks, out_dir: Path, path: str) -> None:
    """On another number of ranks: the checkpoint's weights, and a checkpoint of one more step."""
    runner = make_runner(path, ranks, dtype=torch.float32, budget_tokens=120, has_weights=False)
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    checkpoints.load(NUM_STEPS, ranks=ranks, **runner.saved)
    checkpoints.close()
    want = load_file(out_dir / "trained.safetensors")
    for name, tensor in gather_full_state(runner.policy):
        assert torch.equal(tensor, want[name]), name
    runner.run(owned(NUM_STEPS, ranks.rank, ranks.world_size), step=NUM_STEPS)
    _save(runner, ranks, out_dir, path, step=NUM_STEPS + 1)


def _measure(policy: Policy, ranks: Ranks, out_dir: Path, step: int) -> None:
    samples = [
        TrainingSample(trajectory=each, advantage=1.0, group=0)
        for each in measured(step, ranks.rank, ranks.world_size)
    ]
    policy.zero_grad()
    logp_S = policy(collate(samples, shares_prefixes=policy.shares_prefixes)).logprobs_S
    logp_S.sum().backward()  # type: ignore[no-untyped-call]
    params = dict(policy.named_parameters())
    grads = [
        replace(shard, rows=local(grad))
        for shard in shards_of(policy)
        if (grad := params[f"model.{shard.name}"].grad) is not None
    ]
    _write(ranks, out_dir / f"gradient-{step}.safetensors", dict(gather(grads)))
    _write(ranks, out_dir / f"weights-{step}.safetensors", dict(gather_full_state(policy)))
    save_file({"logp": logp_S.detach()}, out_dir / f"logp-{step}-{ranks.rank}.safetensors")
    policy.zero_grad()


def _save(runner: StepRunner, ranks: Ranks, out_dir: Path, path: str, *, step: int = NUM_STEPS) -> None:
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    checkpoints.save(step, ranks=ranks, extra={}, **runner.saved)
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint


def _write(ranks: Ranks, file: Path, tensors: dict[str, Tensor]) -> None:
    if ranks.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


CHECKS: dict[str, Callable[..., None]] = {"steps": steps, "resume": resume}

if __name__ == "__main__":
    main(**CHECKS)
