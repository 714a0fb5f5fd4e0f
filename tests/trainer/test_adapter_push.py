"""The adapter that the trainer has trained, pushed alone: the engine's log-probs are the trainer's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_like.config import LoraConfig
from areal_like.trajectory import Trajectory
from areal_like.weights.adapters import adapter_shapes, linear_layers
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.adapter_pushes import pushing, serving
from tests.support.engine_harness import TOLERANCE, running_engine, weights_of
from tests.support.trainer_helpers import random_groups, write_model
from tests.support.trainer_ranks import make_runner
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.step.runner import StepRunner
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, Snapshot, WeightSnapshotter

LORA = LoraConfig(rank=3, alpha=12.0)


def log_probs(policy: Policy, trajectories: list[Trajectory]) -> np.ndarray:
    """The trainer's, of all sampled tokens."""
    samples = [TrainingSample(trajectory=t, advantage=0.0, group=0) for t in trajectories]
    with torch.no_grad():
        return np.asarray(policy(collate(samples)).logprobs_S)


def acquired(snapshotter: WeightSnapshotter) -> Snapshot:
    snapshot = snapshotter.take_snapshot()
    assert snapshot is not None and snapshot.acquire()
    return snapshot


@pytest.mark.parametrize("kind", [BackgroundGather, BoundaryGather])
def test_the_engine_has_the_trainers_log_probs(tmp_path: Path, ranks: Ranks, kind: Any) -> None:
    """After each of three steps; the trainer's checks of engines would accept no less."""
    base = write_model(tmp_path / "base", "qwen3", dtype=torch.float32)
    runner: StepRunner = make_runner(base, ranks, dtype=torch.float32, lora=LORA)
    snapshotter = kind(runner.policy, ranks, bucket_bytes=1024, dtype="float32", lora="adapter")
    header = runner.policy.adapter_header
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(base).items()}
    expected = adapter_shapes(header, linear_layers(shapes))
    assert {s.name: s.shape for bucket in snapshotter.buckets for s in bucket.tensors} == expected

    async def body() -> None:
        strategy = ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=pytest.fail)
        with running_engine(Path(base), max_adapters=2, context_length=64) as engine:
            async with (
                engine.client() as client,
                serving(client, strategy, base=header.base) as server,
                pushing(update_mode="recompute") as broadcaster,
            ):
                before: np.ndarray | None = None
                for step in range(4):
                    snapshot = acquired(snapshotter)
                    outcome = await broadcaster.push(
                        snapshot, version=step + 1, step=step, servers=[server.entry]
                    )
                    snapshot.release()
                    assert outcome.activated.keys() == {"rollout-0"}, outcome.failed
                    trajectories = [t for group in random_groups(2, seed=9) for t in group]
                    want, found = log_probs(runner.policy, trajectories), []
                    for trajectory in trajectories:
                        scores, version = await client.score(trajectory.tokens.tolist(), first=1)
                        assert version == step + 1
                        found.append(np.array(scores)[trajectory.loss_mask[1:] > 0])
                    scored = np.concatenate(found)
                    assert np.abs(scored - want).max() < TOLERANCE
                    assert before is None or np.abs(scored - before).max() > 10 * TOLERANCE
                    before = scored
                    runner.run(random_groups(4, seed=step), step=step)

    asyncio.run(body())
    snapshotter.close()
