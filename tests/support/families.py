"""Tiny random models, one for each family of architectures, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from areal_like.weights.untrained import auto_class, is_wrapped, persistent_buffers, text_config
from tests.support.trainer_helpers import ARCHITECTURES, VOCAB, write_model
from trainer.models.tiny import character_tokenizer

NUM_EXPERTS = 8
"""Of every mixture here."""
BODY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BIASED_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    # Five heads, so that two ranks hold unequal shards of A_log.
    "linear_num_key_heads": 1, "linear_num_value_heads": 5, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
QWEN_TOWER: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16, "patch_size": 4,
}  # fmt: skip
M_ROPE: dict[str, Any] = ROPE | {
    "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5,
}  # fmt: skip

TEXT: dict[str, dict[str, Any]] = {
    "qwen3_moe": BODY | EXPERTS | {"head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": BODY | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": BODY | LINEAR,
    "qwen3_5_moe_text": BODY | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
}
"""Language models of which all is trained: family -> its configuration."""
HYBRIDS = ("qwen3_next", "qwen3_5_text")
"""Those with linear attention."""
BIASED: dict[str, dict[str, Any]] = {
    "glm4_moe": BODY | BIASED_EXPERTS | {"attention_bias": True, "rope_parameters": ROPE},
    "deepseek_v3": BODY
    | BIASED_EXPERTS
    | {
        "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 12, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 2,
        "routed_scaling_factor": 1.5,
    },
}  # fmt: skip
"""Routers with a correction bias: family -> its configuration."""
WRAPPED: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": TEXT["qwen3_5_text"] | {"rope_parameters": M_ROPE},
        "vision_config": QWEN_TOWER,
    },
    "qwen3_5_moe": {
        "text_config": TEXT["qwen3_5_moe_text"] | {"rope_parameters": M_ROPE},
        "vision_config": QWEN_TOWER,
    },
    "qwen3_vl": {
        "text_config": BODY
        | {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0]},
    },
    "gemma3": {
        "text_config": BODY | {"sliding_window": 64, "query_pre_attn_scalar": 16},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip
"""Language models with a vision tower: family -> its configuration."""
PARTLY_TRAINED = (*BIASED, *WRAPPED)
FAMILIES = (*ARCHITECTURES, *TEXT, *PARTLY_TRAINED)


def is_trained(name: str, family: str) -> bool:
    """True for a tensor that training changes, by the names that the hub's files of these families have."""
    if family in BIASED:
        return "e_score_correction_bias" not in name
    return "visual" not in name and "vision" not in name and "multi_modal_projector" not in name


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_family(
    name: str, directory: Path, *, seed: int = 0, vocab_size: int = VOCAB, tokenizer: Any = None
) -> str:
    """Writes a random model of a family in FAMILIES with a tokenizer; returns the path.

    A tower is in bfloat16, the rest in float32. Routers choose clearly: with near ties, another order of
    summation would choose other experts. Their biases change the choice. `seed`, `vocab_size` and
    `tokenizer`: not of ARCHITECTURES.
    """
    if name in ARCHITECTURES:
        return write_model(directory, name, dtype=torch.float32)
    config = AutoConfig.for_model(name, **(TEXT | BIASED | WRAPPED)[name])
    text_config(config).vocab_size = vocab_size
    torch.manual_seed(seed)
    model: Any = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param_name, param in model.named_parameters():
            param.add_(torch.randn_like(param) * (1.0 if param_name.endswith(".gate.weight") else 0.05))
        for _, buffer in persistent_buffers(model):
            buffer.add_(torch.randn_like(buffer) * 0.3)
    if is_wrapped(config):
        text = {id(param) for param in (*model.get_decoder().parameters(), *model.lm_head.parameters())}
        for param in model.parameters():
            if id(param) not in text:
                param.data = param.data.to(torch.bfloat16)
    model.save_pretrained(directory)
    if is_wrapped(config):
        processor = {"image_processor_type": "Fast", "patch_size": 4}
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    (tokenizer or character_tokenizer()).save_pretrained(directory)
    return str(directory)
