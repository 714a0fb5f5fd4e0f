"""`plan` of models with linear attention: parameters as published, states in the engine, FLOPs, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from areal_like.runtime.command_line import load_config
from trainer.planning.linear_attention import _delta_rule
from trainer.planning.planner import Plan, make_plan
from trainer.planning.trace import trace_step

SETTINGS = (
    "model.dtype=bfloat16",
    "sampling.max_new_tokens=448",
    "rollout.max_context=512",
    "trainer.tokens_per_microbatch=1024",
    "trainer.gradient_checkpointing=true",
)


def planned(model: str, *settings: str, gpus: str = "1+1xH100") -> Plan:
    return make_plan(load_config([f"model.path={model}", *SETTINGS, *settings]), gpus=gpus)


def small(directory: Path, **changes: Any) -> str:
    """A directory with the config.json of a small hybrid model."""
    shape: dict[str, Any] = {
        "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }  # fmt: skip
    AutoConfig.for_model("qwen3_5_text", **shape | changes).save_pretrained(directory)
    return str(directory)


@pytest.mark.chaos
def test_states_take_the_memory_of_the_cache(tmp_path: Path) -> None:
    plan = planned(small(tmp_path))
    state = 4 * 3 * 4 * 64 * 64
    assert plan.memory.engine.state == state
    assert plan.memory.engine.kv_per_token == 2 * 2 * 2 * 64
    engine = plan.memory.engine
    assert engine.num_sequences(100.0) == engine.kv_at_least / (100 * engine.kv_per_token + state)


@pytest.mark.chaos
def test_the_kernels_keep_less_than_torch(tmp_path: Path) -> None:
    """On a CPU, and in rectangles, transformers' own functions are traced; else on a GPU the stand-ins."""
    kept_all = (small(tmp_path), "trainer.gradient_checkpointing=false")
    plan = planned(*kept_all)
    config = replace(plan.config, trainer=replace(plan.config.trainer, device="cpu"))
    on_gpu, on_cpu = plan.trace, trace_step(config, plan.shape, plan.lengths)
    in_rectangles = planned(*kept_all, "trainer.attention=rectangles").trace
    kept = [trace.peak_bytes["activations"] for trace in (on_gpu, on_cpu, in_rectangles)]
    assert kept[0] < min(kept[1:]) / 2 and kept[2] == pytest.approx(kept[1], rel=0.1)
    assert on_gpu.linear_flops["policy"] < on_cpu.linear_flops["policy"], "without padding"


def test_products_of_the_delta_rule() -> None:
    """The forward of one head over two chunks: eight products, as in arXiv 2412.06464, section 3.3."""
    query, key = (torch.zeros(1, 128, 1, 16, requires_grad=True) for _ in range(2))
    value = torch.zeros(1, 128, 1, 8, requires_grad=True)
    gate, beta = (torch.zeros(1, 128, 1, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False) as counter:
        out, _ = _delta_rule(query, key, value, gate, beta)
        forward = counter.get_total_flops()
        out.sum().backward()
    sizes = {"C": 64, "K": 16, "V": 8}
    products = ("CKC", "CCK", "CCV", "CKV", "KCV", "CKC", "CKV", "CCV")
    want = sum(2 * 2 * sizes[a] * sizes[b] * sizes[c] for a, b, c in products)
    assert out.shape == value.shape and forward == want
    assert 3 * forward < counter.get_total_flops() - forward < 5 * forward, "it computes the states again"
    assert all(each.grad is not None for each in (query, key, value, gate, beta))


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("name", "parameters", "gpus"),
    [
        ("Qwen/Qwen3.5-9B", 8.95e9, "2+6xH100"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79.7e9, "8+64xH100"),
    ],
)
def test_published_shapes(name: str, parameters: float, gpus: str) -> None:
    plan = planned(
        name,
        "rollout.engine=sglang",
        "rollout.gpus_per_engine=8" if "80B" in name else "rollout.gpus_per_engine=1",
        "trainer.groups_per_step=64",
        gpus=gpus,
    )
    assert plan.trace.num_params == pytest.approx(parameters, rel=0.01)
    states = 16 * plan.trace.num_trained / plan.trace.world_size
    named = ("weights (float32 masters)", "gradients", "Adam's moments")
    assert sum(plan.trace.peak_bytes[part] for part in named) == pytest.approx(states, rel=0.01)
    assert plan.fits, plan.memory.problems
