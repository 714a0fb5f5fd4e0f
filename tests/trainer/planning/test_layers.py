"""A trace of three and of four layers, extended to all layers, against a trace of all layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from areal_like.runtime.command_line import load_config
from tests.support.families import write_family
from trainer.planning.layers import has_equal_layers
from trainer.planning.planner import Plan, make_plan
from trainer.planning.trace import PUSH, trace_step

NUM_LAYERS = 8


def model_setting(directory: Path, **changes: Any) -> str:
    """The setting of a model whose layers are sharded one by one."""
    shape = {
        "vocab_size": 40_000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    Qwen3Config(**shape | changes).save_pretrained(directory)  # type: ignore[arg-type]
    return f"model.path={directory}"


SHORT = (
    "sampling.max_new_tokens=112",
    "rollout.max_context=128",
    "model.dtype=bfloat16",
    "trainer.tokens_per_microbatch=256",
)
LONG = (
    "sampling.max_new_tokens=448",
    "rollout.max_context=512",
    "model.dtype=bfloat16",
    "trainer.tokens_per_microbatch=4096",
)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(
            4, (*LONG, "trainer.gradient_checkpointing=true", "kl.coef=0.1"), marks=pytest.mark.long
        ),
        pytest.param(
            4,
            (*LONG, "trainer.gradient_checkpointing=selective", "trainer.offload_activations=true"),
            marks=pytest.mark.chaos,
        ),
        pytest.param(
            2,
            (*SHORT, "model.lora.rank=4", "kl.coef=0.1", "distill.teachers.default=tiny", "objective=tis"),
            marks=pytest.mark.chaos,
        ),
        pytest.param(
            1,
            (
                *SHORT,
                "model.lora.rank=4",
                "advantage=gae",
                "objective=decoupled_ppo",
                "objective.prox=average",
            ),
            marks=pytest.mark.chaos,
        ),
        pytest.param(1, (*LONG, "trainer.gradient_checkpointing=false"), marks=pytest.mark.chaos),
        pytest.param(1, (*SHORT, "advantage=prime"), marks=pytest.mark.chaos),
        pytest.param(
            2, (*SHORT, "advantage=gae", "trainer.reshard_after_forward=false"), marks=pytest.mark.chaos
        ),
        pytest.param(
            1, (*SHORT, "objective=decoupled_ppo", "objective.prox=average"), marks=pytest.mark.chaos
        ),
    ],
)
def test_few_layers_are_as_exact_as_all(ranks: int, settings: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config([model_setting(tmp_path), *settings])
    assert_few_are_enough(make_plan(config, gpus=f"1+{ranks}xH100"))


@pytest.mark.chaos
def test_the_peak_may_be_at_another_stage(tmp_path: Path) -> None:
    """With three and four layers it is the gradient of the large embedding, with eight that of the head."""
    config = load_config([model_setting(tmp_path, vocab_size=100_000), *SHORT, "model.dtype=float32"])
    assert_few_are_enough(make_plan(config, gpus="1+4xH100"))


def assert_few_are_enough(plan: Plan) -> None:
    assert has_equal_layers(plan.shape)
    assert plan.trace == trace_step(plan.config, plan.shape, plan.lengths, every_layer=True)


@pytest.mark.chaos
def test_layers_are_sharded_as_in_the_whole_model(tmp_path: Path) -> None:
    """Three layers are small enough to be gathered together with the rest, and all layers are not."""
    model = model_setting(tmp_path, vocab_size=1000, hidden_size=320, intermediate_size=960)
    assert_few_are_enough(make_plan(load_config([model, *SHORT]), gpus="1+2xH100"))


@pytest.mark.chaos
def test_unequal_layers_are_all_traced(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    model = model_setting(tmp_path, num_hidden_layers=8, layer_types=kinds, use_sliding_window=True)
    plan = make_plan(load_config([model, *SHORT]), gpus="1+2xH100")
    assert not has_equal_layers(plan.shape)
    assert plan.trace.num_params > 8 * 3 * 256 * 768


@pytest.mark.chaos
def test_adapters_of_mixtures_are_merged_in_the_trace(tmp_path: Path) -> None:
    settings = (f"model.path={write_family('qwen3_moe', tmp_path)}", *SHORT, "model.lora.rank=4")
    merged, apart = (
        make_plan(load_config([*settings, f"weights.lora={way}"]), gpus="1+2xH100").trace.resident_bytes
        for way in ("merged", "adapter")
    )
    assert merged[PUSH] > 0 == apart.get(PUSH, 0)
