"""Every objective, advantage, mask and shaping in the trainer's own step, built from its preset.

In float32 and in bfloat16, with the log-probs of the current weights and with those of older ones, one sample
far away. Among the samples are one-token answers and a group without a spread of rewards.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_like.runtime.command_line import load_config
from areal_like.trajectory import FinishReason, Trajectory
from tests.support.full_state import gather_full_state
from tests.support.quick import only_in_chaos
from tests.support.trainer_helpers import dense_logprobs, flattened, random_groups, write_model
from trainer.advantages import ADVANTAGES
from trainer.advantages.reward_shaping import SHAPINGS
from trainer.distributed.ranks import Ranks
from trainer.models.policy import build_policy
from trainer.objectives import MASKS, OBJECTIVES
from trainer.step.build import build_step_runner

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = [
    [f"{section}={file.stem}"]
    for section in ("objective", "advantage")
    for file in sorted((CONFIGS / section).glob("*.yaml"))
]
MASKED = [["objective=tis", f"objective.masks=[{{name: {name}}}]"] for name in MASKS.names()]
NEEDED = {"laconic": ", budget_tokens: 2"}
"""Settings without which a shaping is refused."""
SHAPED = [
    ["advantage=grpo", f"advantage.shaping=[{{name: {name}{NEEDED.get(name, '')}}}]"]
    for name in SHAPINGS.names()
]
VERSION = 5
"""Of the weights that have sampled `random_groups`."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("teacher"), dtype=torch.float32, seed=1)


@pytest.fixture(scope="module")
def groups(path: str) -> list[list[Trajectory]]:
    """Three groups with the model's log-probs: the first has equal rewards, the last one-token answers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    equal, mixed, short = random_groups(3, group_size=4, longest=8)
    found = [equal, mixed, [one_token(t) for t in short]]
    for group in found:
        with torch.no_grad():
            logp_BL = dense_logprobs(model, group).numpy()
        for t, logp_L in zip(group, logp_BL, strict=True):
            t.logprobs[:] = logp_L[: t.num_tokens] * t.loss_mask
    return found


def one_token(t: Trajectory) -> Trajectory:
    last = np.arange(t.num_tokens) == t.num_tokens - 1
    versions = np.where(last, VERSION, -1).astype(np.int32)
    return replace(t, loss_mask=last.astype(np.uint8), versions=versions, finish_reason=FinishReason.LENGTH)


def of_older_weights(group: list[Trajectory]) -> list[Trajectory]:
    """The group with other log-probs, those of its first sample far from the model's."""
    moved = [replace(t, logprobs=t.logprobs * np.float32(1.2)) for t in group]
    return [replace(moved[0], logprobs=moved[0].logprobs - 40 * moved[0].loss_mask), *moved[1:]]


@pytest.mark.parametrize("dtype", ["bfloat16", *only_in_chaos("float32")])
@pytest.mark.parametrize("overrides", PRESETS + MASKED + SHAPED, ids=" ".join)
def test_steps_on_new_and_old_samples(
    path: str, teacher: str, ranks: Ranks, groups: list[list[Trajectory]], overrides: list[str], dtype: str
) -> None:
    taught = [f"distill.teachers.default={teacher}"] if overrides == ["objective=distill"] else []
    config = load_config([*overrides, *taught, "trainer.warmup_steps=1"])
    size, greedy = min(config.sampling.group_size, 3), config.sampling.greedy_baseline
    of_job = [[*group[:size], *[replace(t, is_greedy=True) for t in group[3:] if greedy]] for group in groups]
    config = replace(config, model=replace(config.model, dtype=dtype))
    runner = build_step_runner(config, build_policy(config, path, ranks), ranks, initial=path)
    before = [tensor.clone() for _, tensor in gather_full_state(runner.policy)]
    for lag in (0, 4):
        used = [of_older_weights(group) for group in of_job] if lag else of_job
        metrics = flattened(runner.run(used, step=VERSION + lag))
        unusual = {name: value for name, value in metrics.items() if not np.isfinite(value)}
        assert not unusual, lag
    after = [tensor for _, tensor in gather_full_state(runner.policy)]
    assert all(tensor.isfinite().all() for tensor in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_registered_name_has_a_preset() -> None:
    for section, registry in (("objective", OBJECTIVES), ("advantage", ADVANTAGES)):
        assert {file.stem for file in (CONFIGS / section).glob("*.yaml")} >= set(registry.names())
