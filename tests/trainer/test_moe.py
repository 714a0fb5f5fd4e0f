"""A mixture-of-experts policy: packed forward, gradients on several ranks, pushes and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.trainer_helpers import VOCAB, dense_logprobs, random_groups, run_ranks
from tests.trainer.test_policy import gradients, packed, sampled
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.models.tiny import character_tokenizer

NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3-MoE of 50 thousand parameters with routers that choose clearly."""
    directory = tmp_path_factory.mktemp("moe")
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, num_experts=NUM_EXPERTS,
        num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.add_(torch.randn_like(param) * (1.0 if name.endswith("gate.weight") else 0.05))
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return str(directory)


def test_packed_and_grouped_equals_padded_and_eager(path: str) -> None:
    trajectories = [trajectory for group in random_groups(3) for trajectory in group]
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    reference.set_experts_implementation("eager")
    want_S = sampled(dense_logprobs(reference, trajectories), trajectories)
    policy = Policy.load(path, Ranks.alone())
    assert policy.model.config._experts_implementation == "grouped_mm"
    got_S = policy(packed(trajectories)).logprobs_S
    torch.testing.assert_close(got_S.double(), want_S, rtol=0, atol=1e-5)
    want_S.sum().backward()
    got_S.sum().backward()
    want = gradients(reference)
    assert want.keys() == gradients(policy.model).keys()
    for name, grad in gradients(policy.model).items():
        torch.testing.assert_close(grad.double(), want[name], rtol=1e-4, atol=1e-4, msg=name)


def test_two_ranks_train_push_and_save_like_one(path: str, tmp_path: Path) -> None:
    """Also if a rank has no token for an expert, and if it has none at all."""
    for world_size in (1, 2):
        run_ranks("steps", str(tmp_path), path, world_size=world_size, module="tests.support.moe_ranks")
    one, two = tmp_path / "ranks-1", tmp_path / "ranks-2"
    for share in ("even", "uneven", "one-sided"):
        want, got = load_file(one / f"{share}.safetensors"), load_file(two / f"{share}.safetensors")
        assert want.keys() == got.keys() and want["model.layers.1.mlp.experts.gate_up_proj"].any()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7, msg=f"{share} {name}")
    hits = torch.tensor(json.loads((two / "uneven.json").read_text()))
    assert hits.shape == (2, 2, NUM_EXPERTS)
    assert ((hits[:, 1] == 0) & (hits[:, 0] > 0)).any(), "rank 1 has no token for an expert that rank 0 uses"
    for out in (one, two):
        pushed = load_file(out / "pushed.safetensors")
        [saved] = (out / "checkpoints").iterdir()
        names = load_file(Path(path) / "model.safetensors")
        assert {name: t.shape for name, t in pushed.items()} == {name: t.shape for name, t in names.items()}
        # transformers reads a checkpoint and writes it again, in its own layout: the push has the same bytes.
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).save_pretrained(out / "again")
        for name, tensor in load_file(out / "again" / "model.safetensors").items():
            assert torch.equal(pushed[name], tensor), name
