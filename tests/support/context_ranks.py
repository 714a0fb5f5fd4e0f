"""Ranks of a real trainer in context groups and replicas, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR
SHAPE ...`. A shape is in JSON: arguments of `Ranks`."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from areal_like.config import LoraConfig, from_mapping
from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.routes import routed_groups
from tests.support.trainer_helpers import flattened, joined, random_groups, without_measured
from tests.support.trainer_ranks import DTYPES, main, make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.offline.kind import OfflineTraining
from trainer.offline.run import OfflineRun
from trainer.preferences.training import PreferenceTraining
from trainer.reward_model.training import RewardTraining
from trainer.sft.training import SupervisedTraining
from trainer.step.runner import StepRunner

NUM_STEPS = 3


def step_groups(step: int, *, has_routes: bool = False) -> list[list[Trajectory]]:
    """Six groups with common prompts, some with equal rewards; samples of several segments, one too long to
    be packed into a micro-batch of 48 tokens."""
    groups = random_groups(6, prompt=6, seed=step)
    groups[1][0] = joined(groups[1])
    groups[2][1] = joined([*groups[2], *groups[4], *groups[5]])
    return routed_groups(groups) if has_routes else groups


def case_runner(ranks: Ranks, case: dict[str, Any]) -> StepRunner:
    """`case`: in JSON, `path` and other arguments of `make_runner`, and perhaps `num_steps`."""
    arguments = {"budget_tokens": 48, "max_grad_norm": 1.0, **case}
    arguments.pop("num_steps", None)
    if "lora" in arguments:
        arguments["lora"] = LoraConfig(**arguments["lora"])
    arguments["dtype"] = DTYPES[arguments.get("dtype", "float64")]
    return make_runner(arguments.pop("path"), ranks, **arguments)


def run_steps(runner: StepRunner, ranks: Ranks, steps: Sequence[int]) -> list[dict[str, float]]:
    """Trains these steps; returns their metrics, without times."""
    found = []
    for step in steps:
        groups = step_groups(step, has_routes=runner.policy.replay is not None)
        mine = [groups[at] for at in ranks.share_of(len(groups))]
        metrics = runner.run(mine, step=step, num_groups=len(groups))
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


def cases(_: Ranks, out_dir: Path, shape: str, text: str) -> None:
    """Trains some steps in each case; writes weights and metrics."""
    ranks = Ranks(**json.loads(shape))
    for index, case in enumerate(json.loads(text)):
        runner = case_runner(ranks, case)
        metrics = run_steps(runner, ranks, range(case.get("num_steps", NUM_STEPS)))
        _write(out_dir / str(index), weights_of(runner), ranks, metrics)


def saves(_: Ranks, out_dir: Path, shape: str, text: str, steps: str) -> None:
    """Trains to a checkpoint, and one step more."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    runner = case_runner(ranks, case)
    run_steps(runner, ranks, range(int(steps)))
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=case["path"])
    checkpoints.save(int(steps), ranks=ranks, extra=runner.state(), **runner.saved)
    checkpoints.close()
    metrics = run_steps(runner, ranks, [int(steps)])
    _write(out_dir / "straight", weights_of(runner), ranks, metrics)


def resumes(_: Ranks, out_dir: Path, shape: str, text: str, steps: str, name: str) -> None:
    """Resumes from the checkpoint and trains one step."""
    ranks, case = Ranks(**json.loads(shape)), json.loads(text)
    runner = case_runner(ranks, {**case, "has_weights": False})
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=case["path"])
    runner.restore(checkpoints.load(int(steps), ranks=ranks, **runner.saved))
    checkpoints.close()
    metrics = run_steps(runner, ranks, [int(steps)])
    _write(out_dir / name, weights_of(runner), ranks, metrics)


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
    main(cases=cases, saves=saves, resumes=resumes, offline=offline)
