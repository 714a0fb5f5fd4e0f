"""Tiny random models of architectures whose decoding needs more than keys and values of one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.engine_harness import EOS, VOCAB, Models
from tests.support.families import BIASED, BODY, LINEAR, TEXT

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "eos_token_id": EOS, "initializer_range": 0.15, "tie_word_embeddings": False,
}  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    **TEXT,
    **BIASED,
    "qwen3_next": TEXT["qwen3_next"] | {"mlp_only_layers": [0]},
    "glm4_moe": BIASED["glm4_moe"] | {"use_qk_norm": True},
    "olmo_hybrid": BODY | LINEAR,
}
FAMILIES = tuple(_CONFIGS)


def write_family(name: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a random model of this family; returns its directory.

    A mistake shows in its log-probs: states last for dozens of tokens, and routers choose clearly.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **(_CONFIGS[name] | _COMMON))
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
