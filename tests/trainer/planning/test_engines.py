"""The memory of an engine in a plan: keys and values as the engines keep them, vision towers, routes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from rollout_server.engine.models.loading import load
from tests.support.families import WRAPPED, is_trained, stored, write_family
from trainer.planning.planner import Plan, make_plan
from trainer.planning.report import json_of, text_of
from trainer.planning.shapes import ModelShape, with_local_model

SGLANG = (
    "scale=1xh100_1.7b",
    "rollout.sglang.args=",
    "rollout.max_context=128",
    "sampling.max_new_tokens=112",
    "trainer.tokens_per_microbatch=256",
)


def shape_of(path: str) -> ModelShape:
    return with_local_model(Config(model=replace(Config().model, path=path)))[1]


def planned(path: str, *settings: str) -> Plan:
    return make_plan(load_config([*SGLANG, f"model.path={path}", *settings]), gpus="1+1xH100")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_5_text"])
def test_keys_and_values_of_the_embedded_engine(family: str, tmp_path: Path) -> None:
    path = write_family(family, tmp_path)
    model, _ = load(path, dtype=torch.float32, device=torch.device("cpu"), context_length=16)
    cache = model.facts.new_cache(num_rows=2, context_length=16)
    values = shape_of(path).kv_values_per_token(engine="embedded", num_gpus=1)
    assert cache.num_bytes == 2 * 16 * 4 * values


def test_sglang_keeps_latents_whole(tmp_path: Path) -> None:
    """DeepSeek-V3's own sizes: 70,272 bytes a token in bfloat16, on each GPU of an engine."""
    AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    for num_gpus in (1, 8):
        assert 2 * shape.kv_values_per_token(engine="sglang", num_gpus=num_gpus) == 2 * 61 * (512 + 64)
    assert shape.attention_size == 61 * 128 * (128 + 64 + 128) / 2


def test_flops_of_decoding_with_latents(tmp_path: Path) -> None:
    """DeepSeek-V3: 278,528 FLOPs a layer and position with absorbed projections, 3.4 times those of its
    heads. Without, the latents are expanded for each token, as torch counts it."""
    AutoConfig.for_model("deepseek_v3").save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape.decode_flops_per_position(engine="sglang") == 61 * 278_528 == 61 * 128 * 2 * (576 + 512)
    path = write_family("deepseek_v3", tmp_path)
    small = shape_of(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    flops = []
    for length in (8, 9):
        with torch.no_grad():
            cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == small.decode_flops_per_position(engine="embedded")
    plain = shape_of(write_family("qwen3_moe", tmp_path))
    assert plain.decode_flops_per_position(engine="sglang") == 4 * plain.attention_size


@pytest.mark.parametrize("family", WRAPPED)
def test_towers_are_counted(family: str, tmp_path: Path) -> None:
    path = write_family(family, tmp_path)
    in_files = [tensor.numel() for name, tensor in stored(tmp_path).items() if not is_trained(name, family)]
    assert shape_of(path).num_encoder_params == sum(in_files) > 0


def test_sglang_loads_the_tower(tmp_path: Path) -> None:
    plan = planned(write_family("qwen3_vl", tmp_path))
    engine = plan.memory.engine
    assert engine.encoders == 2 * plan.shape.num_encoder_params > 0
    static = 0.85 * plan.memory.gpu_bytes
    assert engine.kv_cache == static - engine.weights - engine.encoders
    assert "encoders of other inputs" in text_of(plan, [], explain=False)


@pytest.mark.chaos
def test_routes_are_part_of_the_plan(tmp_path: Path) -> None:
    path = write_family("qwen3_moe", tmp_path)
    replay = ("model.router_replay=true", "weights.update_mode=keep")
    plan, without = planned(path, *replay), planned(path)
    assert json_of(without, [])["routes"] is None
    assert "bytes a token" not in text_of(without, [], explain=True)
    bytes_per_token = 2 * 2  # layers, experts of a token
    step = bytes_per_token * plan.num_samples * plan.lengths.mean
    told = json_of(plan, [])["routes"]
    assert (told["bytes_per_token"], told["step"]) == (bytes_per_token, step)
    trainer = plan.config.trainer
    num_steps = trainer.keep_checkpoints * trainer.checkpoint_interval + plan.config.staleness_cap + 1
    assert told["ledger"] == step * min(num_steps, trainer.num_steps)
    added = sum(plan.memory.host.values()) - sum(without.memory.host.values())
    assert added == 2 * step + 4 * bytes_per_token * plan.memory.engine.num_tokens
    assert f"{bytes_per_token} bytes a token" in text_of(plan, [], explain=True)
