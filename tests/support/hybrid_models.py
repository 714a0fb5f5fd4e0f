"""Tiny random models of architectures whose decoding needs more than keys and values of one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.engine_harness import EOS, VOCAB, Models

HYBRIDS = ("qwen3_next", "qwen3_5")
"""Linear attention beside full attention."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_LINEAR_EXPERTS: dict[str, Any] = {
    **_LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_LINEAR_EXPERTS, "mlp_only_layers": [0]},
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR_EXPERTS,
    "olmo_hybrid": _LINEAR,
    "glm4_moe": {
        "num_hidden_layers": 2, "head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "num_mtp_layers": 0, "use_qk_norm": True,
    },
    "qwen3_moe": {
        "num_hidden_layers": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip
FAMILIES = tuple(_SETTINGS)
_MODEL_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Family -> model type of transformers, where they differ."""


def write_family(name: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a random model of this family; returns its directory.

    A mistake shows in its log-probs: states last for dozens of tokens, and routers choose clearly.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(_MODEL_TYPES.get(name, name), **{**_COMMON, **_SETTINGS[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            last = parameter_name.rpartition(".")[2]
            if last == "A_log":
                parameter.uniform_(-3, 0)
            elif last == "dt_bias":
                parameter.normal_(-2, 0.5)
            elif parameter_name.endswith(".gate.weight"):
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.5, 0.5)
    model.to(dtype).save_pretrained(directory)
    return directory


def write_families(name: str, directory: Path) -> Models:
    """Writes two models of one family with different weights."""
    return write_family(name, directory / "0", seed=0), write_family(name, directory / "1", seed=1)
