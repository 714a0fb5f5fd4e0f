"""VCPO's measured rho_ref in the optimizer step: over ranks, in checkpoints, and in a resumed run."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import mixed_groups, run_ranks, write_model
from tests.support.trainer_ranks import make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks

MODULE = "tests.support.method_ranks"
SETTINGS = {"objective": {"name": "vcpo", "rho_ref": "measured", "norms": "proxy"}}


def test_a_resumed_run_has_the_same_bits(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    unbroken = make_runner(path, ranks, dtype=torch.float32, settings=SETTINGS)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, tokenizer_path=path)
    rows = []
    for step in range(1, 5):
        rows.append(unbroken.run(mixed_groups(step), step=step))
        if step == 2:
            checkpoints.save(3, unbroken.policy, unbroken.optimizer, ranks, extra=unbroken.state())
    checkpoints.wait()
    assert len({row["rho_ref"] for row in rows}) == 4 and all(0 < row["rho_ref"] < 1 for row in rows)
    scales = [min(1, row["ess_ratio"] / row["rho_ref"]) ** 0.5 for row in rows]
    assert [row["lr_scale"] for row in rows] == pytest.approx(scales) and min(scales) < 1

    resumed = make_runner(path, ranks, dtype=torch.float32, settings=SETTINGS)
    extra = checkpoints.load(3, resumed.policy, resumed.optimizer, ranks)
    resumed.restore(extra)
    for step, before in ((3, rows[2]), (4, rows[3])):
        row = resumed.run(mixed_groups(step), step=step)
        assert (row["rho_ref"], row["lr_scale"]) == (before["rho_ref"], before["lr_scale"])
    assert resumed.state() == unbroken.state()
    for (name, a), (_, b) in zip(
        gather_full_state(unbroken.policy), gather_full_state(resumed.policy), strict=True
    ):
        assert torch.equal(a, b), name

    fixed = make_runner(path, ranks, dtype=torch.float32)
    fixed.restore(extra)
    assert "objective_state" not in fixed.state()
    resumed.restore({"shaping_duals": []})
    assert resumed.state() == unbroken.state(), "a checkpoint without one changes nothing"


def test_two_ranks_have_the_reference_of_one(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model")
    run_ranks("references", str(tmp_path), path, json.dumps(SETTINGS), world_size=2, module=MODULE)
    runner = make_runner(path, ranks, settings=SETTINGS)
    for step in (1, 2):
        runner.run(mixed_groups(step), step=step)
    got = json.loads((tmp_path / "reference-0.json").read_text())
    assert got == json.loads((tmp_path / "reference-1.json").read_text()), "equal bits on every rank"
    assert got["objective_state"] == pytest.approx(runner.state()["objective_state"])
