"""Tiny random models, one for each family of architectures, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.moe_model import write_moe_model
from tests.support.trainer_helpers import ARCHITECTURES, VOCAB, write_model
from trainer.models.tiny import character_tokenizer

_HYBRID: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    # Five heads, so that two ranks hold unequal shards of A_log.
    "linear_num_key_heads": 1, "linear_num_value_heads": 5, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_HYBRID, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": _HYBRID,
}  # fmt: skip
HYBRIDS = ("qwen3_next", "qwen3_5_text")
"""Families with linear attention."""


def write_family(name: str, directory: Path) -> str:
    """Writes a random float32 model with a vocabulary of VOCAB tokens; returns its path.

    Routers choose clearly: with near ties, another order of summation would choose other experts.
    """
    if name in ARCHITECTURES:
        return write_model(directory, name, dtype=torch.float32)
    if name == "qwen3_moe":
        return write_moe_model(directory, vocab_size=VOCAB)
    config = AutoConfig.for_model(name, **_CONFIGS[name], vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter, param in model.named_parameters():
            param.add_(torch.randn_like(param) * (1.0 if parameter.endswith("mlp.gate.weight") else 0.05))
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return str(directory)
