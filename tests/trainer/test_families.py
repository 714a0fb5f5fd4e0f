"""A model of each family on two ranks: transformers' numbers, a checkpoint, one rank, transformers again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.trajectory import Trajectory
from tests.support.families import write_family
from tests.support.family_ranks import NUM_STEPS, measured
from tests.support.trainer_helpers import run_ranks

FAMILIES = (
    pytest.param("qwen3_5_text", marks=pytest.mark.long),
    *(pytest.param(name, marks=pytest.mark.chaos) for name in ("qwen3_next", "qwen3_moe")),
)
"""Quick tests of their packed forward are in `test_linear_attention.py` and `test_moe.py`."""


def unpacked(model: Any, trajectories: list[Trajectory]) -> Tensor:
    """Log-probs of the sampled tokens by transformers' own forward, one sequence at a time."""
    found = []
    for trajectory in trajectories:
        for part in trajectory.segment_slices:
            tokens_L = torch.from_numpy(trajectory.tokens[part]).long()
            logps_LV = model(input_ids=tokens_L[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            logp_L = logps_LV.gather(1, tokens_L[1:, None])[:, 0]
            found.append(logp_L[torch.from_numpy(trajectory.loss_mask[part][1:]) == 1])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_what_transformers_computes(family: str, tmp_path: Path) -> None:
    path = write_family(family, tmp_path / "model")
    for check, world_size in (("steps", 2), ("resume", 1)):
        run_ranks(check, str(tmp_path), path, world_size=world_size, module="tests.support.family_ranks")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for step in range(NUM_STEPS):
        weights = load_file(tmp_path / f"weights-{step}.safetensors")
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(weights[name])
        model.zero_grad()
        for rank in range(2):
            want_S = unpacked(model, measured(step, rank, 2))
            got_S = load_file(tmp_path / f"logp-{step}-{rank}.safetensors")["logp"]
            torch.testing.assert_close(got_S, want_S.detach(), rtol=0, atol=1e-5)
            want_S.sum().backward()
        gradient = load_file(tmp_path / f"gradient-{step}.safetensors")
        for name, param in model.named_parameters():
            assert param.grad is not None
            torch.testing.assert_close(gradient[name], param.grad, rtol=1e-4, atol=1e-4, msg=name)
    initial = load_file(Path(path) / "model.safetensors")
    for step in (NUM_STEPS, NUM_STEPS + 1):
        (saved,) = (tmp_path / "checkpoints").glob(f"step_*{step}")
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        written = load_file(saved / "model.safetensors")
        assert again.keys() == written.keys() == initial.keys()
        assert not [name for name in again if not torch.equal(again[name], written[name])]
        assert not [name for name in again if torch.equal(written[name], initial[name])], "trained"
        pushes = ("BackgroundGather", "BoundaryGather") if step == NUM_STEPS else ()
        for push in pushes:
            pushed = load_file(tmp_path / f"{push}.safetensors")
            assert pushed.keys() == written.keys()
            assert not [name for name in pushed if not torch.equal(pushed[name], written[name])], push
