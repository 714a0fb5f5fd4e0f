"""LoRA adapters of tiny models, made and computed by peft itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from areal_like.weights.adapters import AdapterHeader, base_digest
from tests.support.engine_harness import load_model
from tests.support.lazily import lazily

peft = lazily("peft")

TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
RANK, ALPHA = 4, 12


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter of a saved model."""

    header: AdapterHeader
    tensors: dict[str, Tensor]
    """As in `adapter_model.safetensors`."""
    model: Any
    """peft's model, base and adapter, float32: the reference."""


def make_adapter(
    base: Path, *, seed: int, targets: Sequence[str] = TARGETS, rank: int = RANK, alpha: float = ALPHA
) -> PeftAdapter:
    """An adapter that changes log-probs visibly: peft starts B at zero, here it is random."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        load_model(base), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    path = base.parent / f"{base.name}-adapter-{seed}"
    model.save_pretrained(path)
    header = AdapterHeader(
        rank=rank, alpha=alpha, targets=tuple(sorted(targets)), base=base_digest([base / "model.safetensors"])
    )
    return PeftAdapter(header, load_file(path / "adapter_model.safetensors"), model)
