"""Ranks that train and push a mixture-of-experts model; the processes of `test_moe.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from areal_like.precision import routers
from tests.support.routes import routed_groups
from tests.support.snapshot_ranks import received
from tests.support.trainer_helpers import joined, random_groups
from tests.support.trainer_ranks import BUDGET_TOKENS, SHARES, last_gradient, main, make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.snapshot import BackgroundGather, BoundaryGather

PPO: dict[str, Any] = {"objective": {"name": "decoupled_ppo", "prox": "snapshot", "interval": 2}}


def steps(ranks: Ranks, out_dir: Path, path: str) -> None:
    """One step for each split of the groups: writes gradients, hit experts, a push and a checkpoint."""
    out = out_dir / f"ranks-{ranks.world_size}"
    out.mkdir(exist_ok=True)
    for share in ("even", "uneven", "one-sided"):
        runner = make_runner(path, ranks, dtype=torch.float32, beta1=0.0, checkpointing=share == "uneven")
        experts = [torch.zeros(runner.policy.model.config.num_experts) for _ in routers(runner.policy)]
        for counts, router in zip(experts, routers(runner.policy), strict=True):

            def count(_: Any, __: Any, output: Any, counts: torch.Tensor = counts) -> None:
                counts += torch.bincount(output[2].flatten(), minlength=len(counts))

            router.register_forward_hook(count)
        owned = zip(random_groups(8), SHARES[share], strict=True)
        runner.run([group for group, owner in owned if owner % ranks.world_size == ranks.rank], step=0)
        hits = torch.stack([ranks.gather(counts) for counts in experts])
        gradient = last_gradient(runner)
        if ranks.rank == 0:
            save_file({k: v.contiguous() for k, v in gradient.items()}, out / f"{share}.safetensors")
            (out / f"{share}.json").write_text(json.dumps(hits.view(-1, ranks.world_size, 8).tolist()))
    for gather in (BackgroundGather, BoundaryGather):
        snapshotter = gather(runner.policy, ranks, bucket_bytes=5000, dtype="float32")
        snapshot = snapshotter.take_snapshot()
        if snapshot is not None:
            assert snapshot.acquire()
            save_file(received(snapshot), out / f"{gather.__name__}.safetensors")
            snapshot.release()
        snapshotter.close()
    checkpoints = Checkpoints(out / "checkpoints", keep=1, tokenizer_path=path)
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint
    other = make_runner(path, ranks, dtype=torch.float32)
    again = Checkpoints(out / "checkpoints", keep=1, tokenizer_path=path)
    again.load(1, other.policy, other.optimizer, ranks)
    again.close()
    for (name, saved), param in zip(runner.policy.named_parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(saved.to_local(), param.to_local()), name  # type: ignore[attr-defined]
        for key, moment in runner.optimizer.moments(name).items():
            assert torch.equal(moment, other.optimizer.moments(name)[key]), (name, key)
    bfloat16(ranks, path)


def replays(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Balanced steps with recomputation and routes, all of them fetched by rank 0; writes their gradients.

    The routes of one sample are missing; two samples are conversations, of which one does not fit a
    micro-batch.
    """
    out = out_dir / f"replays-{ranks.world_size}"
    out.mkdir(exist_ok=True)
    groups = random_groups(8, prompt=6)
    groups[1][0] = joined([groups[1][0], groups[1][1]])
    groups[4][0] = joined([t for group in groups[4:8] for t in group if t.num_tokens > 3])
    assert groups[4][0].num_tokens > BUDGET_TOKENS
    groups = routed_groups(groups)
    groups[5][1] = replace(groups[5][1], routes=None)
    for name, settings in (("tis", None), ("ppo", PPO)):
        runner = make_runner(
            path,
            ranks,
            dtype=torch.float32,
            beta1=0.0,
            checkpointing=True,
            balances=True,
            router_replay=True,
            settings=settings,
        )
        metrics = runner.run(groups if ranks.rank == 0 else [], step=7, num_groups=len(groups))
        gradient = last_gradient(runner)
        if ranks.rank == 0:
            save_file({k: v.contiguous() for k, v in gradient.items()}, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(metrics))


def bfloat16(ranks: Ranks, path: str) -> None:
    """Under FSDP2's mixed precision the routers compute in float32 and their masters get gradients."""
    policy = Policy.load(path, ranks, dtype="bfloat16")
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    for router in routers(policy):
        router.register_forward_hook(lambda _, args, out: dtypes.add((args[0].dtype, out[0].dtype)))
    trajectories = [trajectory for group in random_groups(2) for trajectory in group]
    batch = collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])
    with torch.no_grad():
        want_S = Policy.load(path, ranks)(batch).logprobs_S
    got_S = policy(batch).logprobs_S
    assert dtypes == {(torch.bfloat16, torch.float32)}, dtypes
    assert 0 < float((got_S - want_S).abs().max()) < 0.1
    got_S.sum().backward()  # type: ignore[no-untyped-call]
    for router in routers(policy):
        grad: Any = router.weight.grad  # type: ignore[union-attr]
        assert grad.dtype == torch.float32 and bool(torch.isfinite(grad.to_local()).all())


if __name__ == "__main__":
    main(steps=steps, replays=replays)
