"""A mixture-of-experts policy: packed forward, gradients on several ranks, pushes and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.precision import RouterDtype, routers
from rollout_server.engine.models.loading import load
from tests.areal_like.test_hf_layout import config_of
from tests.support.families import NUM_EXPERTS
from tests.support.moe_model import write_moe_model
from tests.support.trainer_helpers import VOCAB, dense_logprobs, random_groups, run_ranks
from tests.trainer.test_policy import gradients, packed, sampled
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_moe_model(tmp_path_factory.mktemp("moe"), vocab_size=VOCAB)


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


@pytest.mark.parametrize("router_dtype", ["float32", "bfloat16"])
def test_trainer_and_engine_route_alike(path: str, router_dtype: RouterDtype) -> None:
    """In a bfloat16 model both round the routers' products, or both do not."""
    policy = Policy.load(path, Ranks.alone(), dtype="bfloat16", router_dtype=router_dtype)
    engine, _ = load(
        path, dtype=torch.bfloat16, device=torch.device("cpu"), context_length=32, router_dtype=router_dtype
    )
    module = engine._module  # type: ignore[attr-defined]
    chosen: dict[str, list[torch.Tensor]] = {"trainer": [], "engine": []}
    for name, model in (("trainer", policy), ("engine", module)):
        found = chosen[name]
        for router in routers(model):

            def note(_: Any, __: Any, output: Any, found: list[torch.Tensor] = found) -> None:
                logits, _, indices = output
                assert logits.dtype == torch.float32
                assert torch.equal(logits, logits.bfloat16().float()) == (router_dtype == "bfloat16")
                found.append(indices.sort(-1).values)

            router.register_forward_hook(note)
    [trajectory] = [group[0] for group in random_groups(1, longest=30, seed=3)]
    with torch.no_grad():
        policy(packed([trajectory]))
        module(input_ids=torch.from_numpy(trajectory.tokens)[None].long(), use_cache=False)
    assert len(chosen["engine"]) == 2
    assert all(torch.equal(*pair) for pair in zip(chosen["trainer"], chosen["engine"], strict=True))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("jamba", "has linear_attention layers")],
)
def test_other_mixtures_are_refused(model_type: str, message: str, tmp_path: Path) -> None:
    """Before anything is trained or written."""
    AutoModelForCausalLM.from_config(config_of(model_type)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Policy.load(str(tmp_path), Ranks.alone())


@pytest.mark.chaos
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
    names = load_file(Path(path) / "model.safetensors")
    for out in (one, two):
        [saved] = (out / "checkpoints").glob("step_*")
        # transformers reads a checkpoint and writes it again, in its own layout.
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).save_pretrained(out / "again")
        again = load_file(out / "again" / "model.safetensors")
        assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in names.items()}
        written = ("BackgroundGather.safetensors", "BoundaryGather.safetensors", saved / "model.safetensors")
        for file in written:
            tensors = load_file(out / file)
            assert tensors.keys() == again.keys()
            assert not [name for name in again if not torch.equal(tensors[name], again[name])], file
    assert {n for n in names if torch.equal(names[n], again[n])} == set(), "the step has changed every tensor"
