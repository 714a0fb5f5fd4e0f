"""For tests of the trainer: random trajectories, tiny models, a dense reference, and ranks as processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.trajectory import FinishReason, Trajectory
from tests.support import warm_start
from trainer.models.tiny import character_tokenizer

VOCAB = 41
"""Odd, so that two ranks hold unequal shards of the embedding."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1},
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
}


def write_model(
    out_dir: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> str:
    """Writes a random model of about ten thousand parameters and a tokenizer; returns the path."""
    settings = {("n_layer" if architecture == "gpt2" else "num_hidden_layers"): 2, "vocab_size": VOCAB}
    config = AutoConfig.for_model(
        architecture, **ARCHITECTURES[architecture], **settings, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(out_dir)
    character_tokenizer().save_pretrained(out_dir)
    return str(out_dir)


def random_groups(
    num_groups: int, *, group_size: int = 3, seed: int = 0, longest: int = 12, prompt: int = 0
) -> list[list[Trajectory]]:
    """Groups of trajectories, some with several turns; every third group has equal rewards.

    Group g has the metric `of_g`, and every second one the label `even`. The samples of a group begin with
    the same `prompt` tokens, of which some are sampled in one sample and not in another.
    """
    rng = np.random.default_rng(seed)
    groups = [
        [
            replace(
                random_trajectory(rng, longest=longest, reward=float(i % 2) if g % 3 else 1.0),
                metrics={f"of_{g}": float(i)},
                label="" if g % 2 else "even",
            )
            for i in range(group_size)
        ]
        for g in range(num_groups)
    ]
    for group in groups:
        first = max((t.tokens for t in group), key=len)[:prompt]
        for trajectory in group:
            trajectory.tokens[:prompt] = first[: trajectory.num_tokens]
    return groups


def mixed_groups(step: int) -> list[list[Trajectory]]:
    """Four groups for step 1 or later: every second sample is from its weights, the others are one older."""
    return [
        [
            replace(t, versions=np.where(t.loss_mask, step - index % 2, -1).astype(np.int32))
            for index, t in enumerate(group)
        ]
        for group in random_groups(4, seed=step)
    ]


def random_trajectory(rng: np.random.Generator, *, longest: int, reward: float) -> Trajectory:
    """3 to `longest` tokens, of which the last and others at random are sampled under version 5."""
    length = int(rng.integers(3, longest + 1))
    mask = (rng.random(length) < 0.7).astype(np.uint8)
    mask[0], mask[-1] = 0, 1
    return Trajectory(
        tokens=rng.integers(3, VOCAB, length).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -3.7 + 0.3 * rng.standard_normal(length), 0).astype(np.float32),
        versions=np.where(mask, 5, -1).astype(np.int32),
        reward=reward,
        reward_components={"half": reward / 2},
        finish_reason=FinishReason.STOP,
    )


def joined(trajectories: Sequence[Trajectory], **changes: Any) -> Trajectory:
    """One trajectory whose segments these are, with the first one's reward and these changes."""
    arrays = {
        name: np.concatenate([getattr(t, name) for t in trajectories])
        for name in ("tokens", "loss_mask", "logprobs", "versions")
    }
    segments = tuple(t.num_tokens for t in trajectories)
    return replace(trajectories[0], **arrays, segments=segments, **changes)


def dense_logprobs(model: Any, trajectories: list[Trajectory], *, temperature: float = 1.0) -> Tensor:
    """[B, L] log-prob of each token given its prefix, by transformers' own attention on a padded batch."""
    model.set_attn_implementation("sdpa")
    longest = max(t.num_tokens for t in trajectories)
    tokens_BL = torch.zeros(len(trajectories), longest, dtype=torch.long)
    for row, t in enumerate(trajectories):
        tokens_BL[row, : t.num_tokens] = torch.from_numpy(t.tokens)
    # Padding is at the end, where a causal model does not attend to it.
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits / temperature
    logps_BL = torch.log_softmax(logits_BLV[:, :-1], -1).gather(-1, tokens_BL[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.zeros(len(trajectories), 1, dtype=logps_BL.dtype), logps_BL], 1)


def run_ranks(
    check: str,
    *args: str,
    world_size: int,
    module: str = "tests.support.trainer_ranks",
) -> None:
    """Runs `python -m MODULE CHECK ARGS` as real ranks over gloo; raises with their output if one fails."""
    store = Path(args[0]) / f"store-{check}-{world_size}-{os.urandom(4).hex()}"
    starter = "tests.support.quick_start"
    ranks = warm_start.Popen(
        [sys.executable, "-m", starter, module, check, str(store), str(world_size), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = ranks.communicate()
    finally:
        ranks.kill()  # the ranks are its forks and die with it
    assert ranks.returncode == 0, output


def flattened(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All metrics as numbers, those in mappings by `name.key`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def without_measured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that follow from the data: without times, rates and memory."""
    measured = re.compile(r".*_s(_min|_max|_per_gpu|_trained)?|mfu\w*|memory_\w+")
    return {name: value for name, value in metrics.items() if not measured.fullmatch(name)}


def pretend_liger(
    monkeypatch: pytest.MonkeyPatch, apply: Callable[..., None] | None, *, family: str = "qwen3"
) -> None:
    """Puts a package in place of Liger, which needs a GPU, that calls `apply`."""
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("monkey_patch")
    package._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {family: None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
