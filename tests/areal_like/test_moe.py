"""Routers of mixture-of-experts models compute in float32, whatever the model's dtype, or round as SGLang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from areal_like.precision import route_in_float32, routers
from tests.areal_like.test_hf_layout import config_of, on_meta

TOKENS = torch.arange(3, 23)[None]


def model_of(model_type: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type), dtype=dtype).eval()
    for router in routers(model):
        torch.nn.init.normal_(router.weight)
    return model


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss"])
def test_the_router_of_a_bfloat16_model_computes_in_float32(model_type: str) -> None:
    model = model_of(model_type, torch.bfloat16)
    found = list(routers(model))
    assert len(found) == model.config.num_hidden_layers
    route_in_float32(model)
    seen: list[tuple[Any, Any]] = []
    for router in found:
        router.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    logits = model(input_ids=TOKENS, use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    for router, (hidden, out) in zip(found, seen, strict=True):
        floats = [each for each in out if each.is_floating_point()]
        assert hidden.dtype == torch.bfloat16 and {each.dtype for each in floats} == {torch.float32}
        bias = getattr(router, "bias", None)
        want = F.linear(hidden.float(), router.weight.float(), None if bias is None else bias.float())
        assert any(torch.equal(each, want) for each in floats), "the logits are not rounded"
        assert router.weight.dtype == router.weight.grad.dtype == torch.bfloat16
        assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe"])
def test_a_router_may_round_its_product(model_type: str) -> None:
    """And nothing else: scores and weights stay float32. GLM defines its product in float32."""
    model = model_of(model_type, torch.bfloat16)
    found = list(routers(model))
    route_in_float32(model, product="bfloat16")
    seen: list[tuple[Any, Any]] = []
    for router in found:
        router.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    logits = model(input_ids=TOKENS, use_cache=False).logits
    logits.float().square().sum().backward()
    assert len(seen) == len(found) > 0
    for router, (hidden, out) in zip(found, seen, strict=True):
        floats = [each for each in out if each.is_floating_point()]
        assert {each.dtype for each in floats} == {torch.float32}
        rows, bias = hidden.flatten(0, -2), getattr(router, "bias", None)
        exact = F.linear(rows.float(), router.weight.float(), None if bias is None else bias.float())
        rounded = F.linear(rows, router.weight, bias).float()
        assert not torch.equal(exact, rounded)
        want = exact if model_type == "glm4_moe" else rounded
        # The second tensor are the weights of the chosen experts, which are not rounded.
        assert any(torch.equal(each, want) for each in floats)
        assert any(not torch.equal(each, each.bfloat16().float()) for each in floats[1:])
        assert router.weight.grad.abs().sum() > 0


def test_wide_models_and_models_without_experts_are_unchanged() -> None:
    for dtype in (torch.float32, torch.float64):
        model = model_of("qwen3_moe", dtype)
        if dtype == torch.float64:  # transformers' default needs float32 or narrower
            model.set_experts_implementation("eager")
        want = model(input_ids=TOKENS, use_cache=False).logits
        route_in_float32(model)
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, want)
    for model_type in ("llama", "gpt2"):
        assert not list(routers(on_meta(model_type)))
