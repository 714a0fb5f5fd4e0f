"""Ranks of a real trainer in context groups and replicas, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR
SHAPE ...`. A shape is in JSON: arguments of `Ranks`."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from areal_like.config import LoraConfig, from_mapping
from areal_like.errors import ArealError, ConfigError
from areal_like.trajectory import STEP_ENDS, STEP_REWARDS, Trajectory
from tests.support.full_state import gather_full_state
from tests.support.part_groups import example_step
from tests.support.routes import routed_groups
from tests.support.snapshot_ranks import received
from tests.support.trainer_helpers import flattened, joined, random_groups, without_measured
from tests.support.trainer_ranks import DTYPES, last_gradient, main, make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.offline.kind import OfflineTraining
from trainer.offline.run import OfflineRun
from trainer.preferences.training import PreferenceTraining
from trainer.reward_model.training import RewardTraining
from trainer.sft.training import SupervisedTraining
from trainer.step.runner import StepRunner
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, WeightSnapshotter

NUM_STEPS = 3


def step_groups(step: int, *, has_routes: bool = False, has_steps: bool = False) -> list[list[Trajectory]]:
    """Six groups with common prompts, some with equal rewards; samples of several segments, one too long to
    be packed into a micro-batch of 48 tokens."""
    groups = random_groups(6, prompt=6, seed=step)
    if has_steps:
        groups = [[_with_steps(trajectory) for trajectory in group] for group in groups]
    groups[1][0] = joined(groups[1])
    groups[2][1] = joined([*groups[2], *groups[4], *groups[5]])
    return routed_groups(groups) if has_routes else groups


def _with_steps(trajectory: Trajectory) -> Trajectory:
    """With rewards of its first two sampled tokens, of different sizes."""
    ends_K = np.flatnonzero(trajectory.loss_mask)[:2] + 1
    rewards_K = np.linspace(0.25, 1 + trajectory.reward, len(ends_K))
    arrays = {STEP_ENDS: ends_K.astype(np.int32), STEP_REWARDS: rewards_K.astype(np.float32)}
    return replace(trajectory, arrays=arrays)


def case_runner(ranks: Ranks, case: dict[str, Any]) -> StepRunner:
    """`case`: in JSON, `path` and other arguments of `make_runner`, and perhaps `num_steps`. With one step,
    its gradient is Adam's first moment."""
    arguments = {"budget_tokens": 48, "max_grad_norm": 1.0, **case}
    if arguments.pop("num_steps", None) == 1:
        arguments["beta1"] = 0.0
    if "lora" in arguments:
        arguments["lora"] = LoraConfig(**arguments["lora"])
    arguments["dtype"] = DTYPES[arguments.get("dtype", "float64")]
    return make_runner(arguments.pop("path"), ranks, **arguments)


def run_steps(
    runner: StepRunner, ranks: Ranks, case: dict[str, Any], *, first: int = 0, num: int = 0
) -> list[dict[str, float]]:
    """Trains `num` steps (0: those of the case); returns their metrics, without times. A case with `beyond`
    has whole groups and parts of groups."""
    has_steps = case.get("settings", {}).get("advantage", {}).get("name") == "grpo_process"
    found = []
    for step in range(first, first + (num or case.get("num_steps", NUM_STEPS))):
        if "beyond" in case:
            served = example_step(step + 4)
            mine = [served[at] for at in ranks.share_of(len(served))]
            metrics = runner.run_served(mine, step=step + 4, num_groups=len(served), max_staleness=2)
        else:
            groups = step_groups(step, has_routes=runner.policy.replay is not None, has_steps=has_steps)
            metrics = runner.run(
                [groups[at] for at in ranks.share_of(len(groups))], step=step, num_groups=len(groups)
            )
        found.append(flattened(without_measured(metrics)))
    return found


def weights_of(runner: StepRunner) -> dict[str, Tensor]:
    """On rank 0: the weights of policy, critic and reward model. Collective."""
    models: dict[str, PackedModel] = {"policy": runner.policy}
    if runner.critic is not None:
        models["critic"] = runner.critic.model
    if runner.prm is not None:
        models["prm"] = runner.prm.model
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in models.items()
        for key, tensor in gather_full_state(model)
    }


def gradient_of(runner: StepRunner) -> dict[str, Tensor]:
    """On rank 0: the gradient of the only step of policy and critic. Collective."""
    found = {f"policy.{name}": each for name, each in last_gradient(runner).items()}
    if runner.critic is not None:
        found |= {f"critic.{name}": each for name, each in last_gradient(runner.critic).items()}
    return {name: each.contiguous() for name, each in found.items()}


def cases(_: Ranks, out_dir: Path, shape: str, text: str) -> None:
    """Trains some steps in each case; writes metrics and weights, or with one step its gradient. In the first
    case, and with an adapter, what is pushed are the weights."""
    ranks = Ranks(**json.loads(shape))
    for index, case in enumerate(json.loads(text)):
        runner = case_runner(ranks, case)
        metrics = run_steps(runner, ranks, case)
        weights = weights_of(runner)
        found = gradient_of(runner) if case.get("num_steps") == 1 else weights
        _write(out_dir / str(index), found, ranks, metrics)
        for gathering in (BackgroundGather, BoundaryGather) if index == 0 or "lora" in case else ():
            _check_push(gathering(runner.policy, ranks, bucket_bytes=5000, dtype="float32"), weights)


def _check_push(snapshotter: WeightSnapshotter, weights: dict[str, Tensor]) -> None:
    if (snapshot := snapshotter.take_snapshot()) is not None:
        assert snapshot.acquire()
        pushed = received(snapshot)
        own = {name for name in pushed if f"policy.{name}" in weights}  # with an adapter, only the others
        assert own and all(torch.equal(pushed[name], weights[f"policy.{name}"].float()) for name in own)
        snapshot.release()
    snapshotter.close()


def saves(_: Ranks, out_dir: Path, shape: str, text: str, steps: str) -> None:
    """Trains to a checkpoint, and one step more."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    runner = case_runner(ranks, case)
    run_steps(runner, ranks, case, num=int(steps))
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=case["path"])
    checkpoints.save(int(steps), ranks=ranks, extra=runner.state(), **runner.saved)
    checkpoints.close()
    metrics = run_steps(runner, ranks, case, first=int(steps), num=1)
    _write(out_dir / "straight", weights_of(runner), ranks, metrics)


def resumes(_: Ranks, out_dir: Path, shape: str, text: str, steps: str, name: str) -> None:
    """Resumes from the checkpoint and trains one step."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    runner = case_runner(ranks, {**case, "has_weights": False})
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=case["path"])
    runner.restore(checkpoints.load(int(steps), ranks=ranks, **runner.saved))
    checkpoints.close()
    metrics = run_steps(runner, ranks, case, first=int(steps), num=1)
    _write(out_dir / name, weights_of(runner), ranks, metrics)


def unequal(_: Ranks, out_dir: Path, shape: str, text: str) -> None:
    """A rank of the last replica gets other weights: the step ends on every rank, and files that differ from
    machine to machine are found when they have been read."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    is_last = ranks.rank == ranks.world_size - 1
    runner = case_runner(ranks, case)
    run_steps(runner, ranks, case, num=1)
    if is_last:
        # More than the last bit of a small weight, which the update may round away.
        next(iter(runner.optimizer.shards.values())).data.view(-1)[0] += 1
    named = f"ranks {ranks.world_size - 1} hold other weights than replica 0"
    with pytest.raises(ArealError, match=f"{named} after the same update"):
        run_steps(runner, ranks, case, first=1, num=1)
    path = out_dir / "other" if is_last else case["path"]
    with pytest.raises(ConfigError, match=rf"trainer.replicas={ranks.num_replicas}: {named}"):
        case_runner(ranks, {**case, "path": str(path)})


def loses_a_replica(_: Ranks, out_dir: Path, shape: str, text: str) -> None:
    """The last rank is killed between its gradients and their sum over the replicas: no other rank makes an
    update. Each writes `survivor-RANK`."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    runner = case_runner(ranks, case)
    run_steps(runner, ranks, case, num=1)
    before = {name: shard.detach().clone() for name, shard in runner.optimizer.shards.items()}
    if ranks.rank == ranks.world_size - 1:
        assert ranks.replicas is not None
        ranks.replicas.add_up = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        run_steps(runner, ranks, case, first=1, num=1)
    assert runner.optimizer.num_updates == 1
    assert all(torch.equal(shard, before[name]) for name, shard in runner.optimizer.shards.items())
    (out_dir / f"survivor-{ranks.rank}").touch()


def offline_kinds() -> dict[str, OfflineTraining]:
    """A new one of each kind, by the name of its section."""
    return {kind.name: kind for kind in (SupervisedTraining(), RewardTraining(), PreferenceTraining())}


def offline(_: Ranks, out_dir: Path, shape: str, text: str) -> None:
    """Trains the jobs of a JSON mapping: name of the run -> [name of the section, configuration]."""
    ranks = Ranks(**json.loads(shape))
    for name, (section, job) in json.loads(text).items():
        config = from_mapping({**job, "name": name, "runs_dir": str(out_dir)})
        OfflineRun(offline_kinds()[section], config, ranks, stopping=threading.Event(), started_s=0.0).run()


def _write(stem: Path, weights: dict[str, Tensor], ranks: Ranks, metrics: list[dict[str, float]]) -> None:
    if ranks.rank == 0:
        save_file(weights, f"{stem}.safetensors")
        Path(f"{stem}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(
        cases=cases,
        saves=saves,
        resumes=resumes,
        unequal=unequal,
        loses_a_replica=loses_a_replica,
        offline=offline,
    )
