"""trainer.compile: the same values and gradients to float32's rounding, the same names, one compilation."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from areal_like.config.loading import from_mapping
from areal_like.errors import ConfigError
from tests.support.trainer_helpers import random_groups, write_model
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.packed_model import decoder_layers
from trainer.models.policy import Policy
from trainer.step.recipe import StepRecipe

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


@pytest.mark.chaos
@needs_compiler
def test_compiled_layers_change_nothing_but_rounding(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    path = write_model(tmp_path, "qwen3", dtype=torch.float32)
    batches = [
        collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for group in groups for t in group])
        for groups in (random_groups(n, seed=n, prompt=6, longest=12 + n) for n in (3, 5, 8))
    ]
    results: list[list[tuple[Tensor, dict[str, Tensor]]]] = []
    for compiles in (False, True):
        policy = Policy.load(path, Ranks.alone(), compiles=compiles, gradient_checkpointing=True)
        counters.clear()
        found = []
        for number, batch in enumerate(batches):
            policy.zero_grad()
            logp_S = policy(batch).logprobs_S
            logp_S.sum().backward()
            grads = {
                name: local(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None
            }
            found.append((logp_S.detach(), grads))
            if number == 0:
                first = counters["stats"]["unique_graphs"]
                assert bool(first) == compiles
        assert counters["stats"]["unique_graphs"] <= first + 1, "compiled again for other lengths"
        results.append(found)
    for (plain_S, plain), (compiled_S, compiled) in zip(*results, strict=True):
        torch.testing.assert_close(compiled_S, plain_S, rtol=1e-5, atol=1e-5)
        assert compiled.keys() == plain.keys()
        for name, grad in compiled.items():
            torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("qwen3", "self_attn"), ("gpt2", "attn"), ("gpt_neox", "attention"), ("opt", "self_attn")],
)
def test_all_but_attention_is_compiled(tmp_path: Path, family: str, attention: str) -> None:
    """Attention would be compiled again for every layout of a batch."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    policy = Policy.build(str(tmp_path), compiles=True)
    for layer in decoder_layers(policy.model):
        plain = {name for name, child in layer.named_children() if child._compiled_call_impl is None}
        assert plain == {attention}


def test_it_is_refused_with_gradients_of_single_sequences() -> None:
    config = from_mapping({"trainer": {"compile": True}, "objective": {"name": "vcpo"}})
    with pytest.raises(ConfigError, match=r"set trainer\.compile=false"):
        StepRecipe.of(config)
