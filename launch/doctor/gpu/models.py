"""Models and samples that the stages make: random weights, random tokens, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from areal_like.trajectory import FinishReason, Trajectory

SAMPLES_OF_GROUP = 4
_LOGITS_SPREAD = 2.0
"""Standard deviation of the logits: wide enough that a wrong position or weight changes log-probs visibly."""


def write_model(path: Path, *, is_small: bool, dtype: torch.dtype) -> str:
    """Writes a Qwen3 with random weights; returns the path.

    The small one has 20,000 parameters, the other 130 million, with the head size of the real models.
    """
    hidden, layers, heads, vocab = (32, 2, 4, 96) if is_small else (1024, 6, 8, 32768)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16 if is_small else 128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=_LOGITS_SPREAD / hidden**0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    from_config: Any = AutoModelForCausalLM.from_config  # untyped
    model = from_config(config, dtype=torch.float32, trust_remote_code=False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms begin at one, which would hide a mistake
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path)
    return str(path)


def random_groups(num_groups: int, *, vocab_size: int, longest: int, seed: int = 0) -> list[list[Trajectory]]:
    """Groups of samples with one prompt each and rewards 0 and 1; the responses have uneven lengths.

    `longest`: most tokens of a prompt and of a response.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(num_groups):
        prompt = rng.integers(3, vocab_size, rng.integers(longest // 4, longest))
        groups.append(
            [
                sampled(
                    prompt,
                    rng.integers(3, vocab_size, rng.integers(longest // 4, longest)),
                    logprobs=None,
                    reward=float(index % 2),
                )
                for index in range(SAMPLES_OF_GROUP)
            ]
        )
    return groups


def sampled(
    prompt: np.ndarray, response: np.ndarray, *, logprobs: np.ndarray | None, reward: float = 0.0
) -> Trajectory:
    """A sample of one turn. `logprobs`: the engine's, of the response; None: made up."""
    length = len(prompt) + len(response)
    mask = np.zeros(length, dtype=np.uint8)
    mask[len(prompt) :] = 1
    known = np.zeros(length, dtype=np.float32)
    known[len(prompt) :] = -3.0 if logprobs is None else logprobs
    return Trajectory(
        tokens=np.concatenate([prompt, response]).astype(np.int32),
        loss_mask=mask,
        logprobs=known,
        versions=np.where(mask, 0, -1).astype(np.int32),
        reward=reward,
        finish_reason=FinishReason.STOP,
    )
