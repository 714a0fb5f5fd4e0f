"""The traced memory of a step against that of the same step run on this CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.trainer_helpers import run_ranks

TOLERANCE = 0.15
SHAPE = Qwen3Config(
    vocab_size=24_000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
"""34 million parameters."""


@pytest.mark.parametrize(
    ("world_size", "checkpointing", "lora_rank", "shape"),
    [
        pytest.param(1, False, 0, {}, marks=pytest.mark.long),
        pytest.param(1, True, 0, {}, marks=pytest.mark.chaos),
        pytest.param(2, False, 0, {}, marks=pytest.mark.chaos),
        pytest.param(2, False, 8, {}, marks=pytest.mark.chaos),
        pytest.param(2, False, 0, {"context_parallel": 2}, marks=pytest.mark.chaos),
        pytest.param(2, False, 0, {"replicas": 2}, marks=pytest.mark.chaos),
    ],
)
def test_trace_is_measured_memory(
    world_size: int, checkpointing: bool, lora_rank: int, shape: dict[str, int], tmp_path: Path
) -> None:
    """Long, because ranks train while their memory is measured."""
    if lora_rank:  # the base is read
        Qwen3ForCausalLM(SHAPE).save_pretrained(tmp_path / "model")
    else:
        SHAPE.save_pretrained(tmp_path / "model")
    settings = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "lora": {"rank": lora_rank}},
        "weights": {"lora": "adapter" if lora_rank else "merged"},  # nothing is pushed here
        "rollout": {"max_context": 128},
        "sampling": {"max_new_tokens": 96, "group_size": 4},
        "task": {"name": "sort", "max_prompt_tokens": 32},
        "trainer": {
            "world_size": world_size,
            **shape,
            "tokens_per_microbatch": 256,
            "logprob_chunk_tokens": 64,
            "gradient_checkpointing": checkpointing,
        },
    }
    run_ranks(
        "memory",
        str(tmp_path),
        json.dumps(settings),
        world_size=world_size,
        module="tests.support.planning_ranks",
    )
    for rank in range(world_size):
        result = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert result["traced"] == pytest.approx(result["measured"], rel=TOLERANCE), result
