"""The running baseline of single samples: by hand, over ranks, in checkpoints and in a repeated run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import random_groups, run_ranks, write_model
from tests.support.trainer_ranks import make_runner
from trainer.advantages import ADVANTAGES, Running
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks

MODULE = "tests.support.method_ranks"
SETTINGS = {"advantage": {"name": "running", "decay": 0.5}, "objective": {"name": "reinforce"}}


def single_samples(step: int) -> list[list[Trajectory]]:
    return random_groups(6, group_size=1, seed=step)


def mean_reward(step: int) -> float:
    return float(np.mean([t.reward for group in single_samples(step) for t in group]))


def test_baseline_by_hand() -> None:
    """Means .2 .6 1 at decay .5: b is .2, then (.1 + .6) / 1.5, then (.05 + .3 + 1) / 1.75."""
    advantage = Running(decay=0.5, first=0.3)
    state = advantage.initial_state()
    shifts = [advantage.shift(state)]
    for mean in (0.2, 0.6, 1.0):
        state = advantage.next_state(state, mean_reward=mean)
        shifts.append(advantage.shift(state))
    assert shifts == pytest.approx([-0.3, -0.2, -0.7 / 1.5, -1.35 / 1.75])
    plain = Running(decay=1.0)
    state = plain.initial_state()
    for mean in (0.2, 0.6, 1.0):
        state = plain.next_state(state, mean_reward=mean)
    assert plain.shift(state) == pytest.approx(-0.6), "the mean over all steps"


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_a_wrong_decay_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        ADVANTAGES.build({"name": "running", "decay": decay})


def test_a_step_learns_from_reward_minus_baseline(tmp_path: Path, ranks: Ranks) -> None:
    """The loss of REINFORCE is linear in the advantage; b is the mean reward of the step before."""
    path = write_model(tmp_path)
    runner = make_runner(path, ranks, settings=SETTINGS)
    first = runner.run(single_samples(0), step=0)
    assert first["reward_baseline"] == 0
    fixed = make_runner(path, ranks, settings=SETTINGS)
    fixed.run(single_samples(0), step=0)
    fixed.advantages.state = (0.0, 1.0)
    with_zero = fixed.run(single_samples(1), step=1)
    fixed = make_runner(path, ranks, settings=SETTINGS)
    fixed.run(single_samples(0), step=0)
    fixed.advantages.state = (1.0, 1.0)
    with_one = fixed.run(single_samples(1), step=1)
    second = runner.run(single_samples(1), step=1)
    b = second["reward_baseline"]
    assert b == pytest.approx(mean_reward(0)) and 0 < b < 1
    assert second["loss"] == pytest.approx((1 - b) * with_zero["loss"] + b * with_one["loss"], rel=1e-9)
    assert runner.advantages.state == pytest.approx((0.5 * b + mean_reward(1), 1.5))


def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    unbroken = make_runner(path, ranks, dtype=torch.float32, settings=SETTINGS)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    rows = []
    for step in range(4):
        rows.append(unbroken.run(single_samples(step), step=step))
        if step == 1:
            checkpoints.save(2, unbroken.policy, unbroken.optimizer, ranks, extra=unbroken.state())
    checkpoints.wait()
    resumed = make_runner(path, ranks, dtype=torch.float32, settings=SETTINGS)
    resumed.restore(checkpoints.load(2, resumed.policy, resumed.optimizer, ranks))
    for step in (2, 3):
        row = resumed.run(single_samples(step), step=step)
        assert row["reward_baseline"] == rows[step]["reward_baseline"]
    assert resumed.advantages.state == unbroken.advantages.state
    for (name, a), (_, b) in zip(
        gather_full_state(unbroken.policy), gather_full_state(resumed.policy), strict=True
    ):
        assert torch.equal(a, b), name
    assert "differs" not in caplog.text

    other = make_runner(path, ranks, dtype=torch.float32)
    other.restore(unbroken.state())
    assert other.advantages.state == () and "advantage differs" in caplog.text
    resumed.restore({"shaping_duals": []})
    assert resumed.advantages.state == unbroken.advantages.state, "a checkpoint without one changes nothing"


def test_two_ranks_have_the_baseline_of_one(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    run_ranks("baselines", str(tmp_path), path, json.dumps(SETTINGS), world_size=2, module=MODULE)
    runner = make_runner(path, ranks, settings=SETTINGS)
    for step in range(2):
        runner.run(random_groups(4, group_size=1, seed=step), step=step)
    got = json.loads((tmp_path / "baseline-0.json").read_text())
    assert got == json.loads((tmp_path / "baseline-1.json").read_text()), "equal bits on every rank"
    assert got == pytest.approx(list(runner.advantages.state))
