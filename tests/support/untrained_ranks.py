"""Ranks that train models of `families`, save and push them; the processes of `test_untrained.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.snapshot_ranks import received
from tests.support.trainer_helpers import random_groups
from tests.support.trainer_ranks import last_gradient, main, make_runner
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import reshard
from trainer.step.runner import StepRunner
from trainer.weights.snapshot import BackgroundGather

NUM_STEPS = 2


def measured_batch() -> PackedBatch:
    """The batch whose log-probs are compared."""
    trajectories = [trajectory for group in random_groups(3, seed=9) for trajectory in group]
    return collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])


def train(path: str, ranks: Ranks) -> StepRunner:
    """A runner after two steps; every rank has some of the groups."""
    runner = make_runner(path, ranks, dtype=torch.float32, beta1=0.0)
    for step in range(NUM_STEPS):
        groups = random_groups(4, seed=step)
        runner.run(groups[ranks.rank :: ranks.world_size], step=step)
    return runner


def steps(ranks: Ranks, out_dir: Path, *paths: str) -> None:
    """For each model: the last gradient, log-probs, a push and a checkpoint, in a folder of its name."""
    for path in paths:
        out = out_dir / Path(path).name
        out.mkdir(exist_ok=True)
        runner = train(path, ranks)
        with torch.no_grad():
            logprobs_S = runner.policy(measured_batch()).logprobs_S
        reshard(runner.policy)
        gradient = last_gradient(runner)
        gathering = BackgroundGather(runner.policy, ranks, bucket_bytes=5000, dtype="float32")
        snapshot = gathering.take_snapshot()
        if snapshot is not None:
            assert snapshot.acquire()
            untrained = {f"untrained.{name}": torch.zeros(1) for name in snapshot.untrained}
            save_file(received(snapshot), out / "pushed.safetensors")
            save_file({"logprobs_S": logprobs_S, **untrained}, out / "facts.safetensors")
            save_file({name: x.contiguous() for name, x in gradient.items()}, out / "gradient.safetensors")
            snapshot.release()
        gathering.close()
        checkpoints = Checkpoints(out / "checkpoints", keep=1, tokenizer_path=path, max_file_bytes=60_000)
        checkpoints.save(NUM_STEPS, runner.policy, runner.optimizer, ranks, extra={})
        checkpoints.wait()
        checkpoints.close()


if __name__ == "__main__":
    main(steps=steps)
