"""The head in float32: both paths of the engine and the trainer agree better in bfloat16 than without it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.precision import widen_head
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.engine.cache import KVCache
from rollout_server.engine.models.loading import load
from tests.support.trainer_helpers import VOCAB, write_model
from trainer.batching.packing import TrainingSample, collate
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy

LENGTH = 24


def engine_logps(path: str, tokens_T: Tensor, *, fp32_head: bool, fast: bool) -> Tensor:
    """Log-probs [T - 1] of the tokens after the first, one decode step each."""
    model, _ = load(
        path,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context_length=LENGTH,
        allow_fast_path=fast,
        fp32_head=fp32_head,
    )
    cache = KVCache(
        model.facts.kv_shapes,
        num_rows=1,
        context_length=LENGTH,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    logps = []
    with torch.inference_mode():
        for position in range(len(tokens_T) - 1):
            batch = cache.begin_decode(np.array([position]))
            logits_1V = model.decode(tokens_T[position : position + 1], batch, cache)
            assert logits_1V.dtype == (torch.float32 if fp32_head else torch.bfloat16)
            logps.append(torch.log_softmax(logits_1V[0].float(), -1)[tokens_T[position + 1]])
    return torch.stack(logps)


@pytest.mark.parametrize("fast", [True, False], ids=["llama", "generic"])
def test_mismatch_in_bfloat16_is_smaller_with_it(tmp_path: Path, fast: bool) -> None:
    path = write_model(tmp_path, "qwen3", dtype=torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.mul_(16)  # confident, as trained models are
    model.save_pretrained(path)
    mismatch = {}
    for fp32_head in (False, True):
        policy = Policy.load(path, Ranks.alone(), dtype="bfloat16", fp32_head=fp32_head)
        differences = []
        for seed in range(6):
            tokens = np.random.default_rng(seed).integers(3, VOCAB, LENGTH).astype(np.int32)
            trajectory = Trajectory(
                tokens=tokens,
                loss_mask=np.ones(LENGTH, dtype=np.uint8),
                logprobs=np.zeros(LENGTH, dtype=np.float32),
                versions=np.zeros(LENGTH, dtype=np.int32),
                reward=0.0,
                finish_reason=FinishReason.STOP,
            )
            batch = collate([TrainingSample(trajectory=trajectory, advantage=1.0, group=0)])
            with torch.no_grad():
                ours_S = policy(batch).logprobs_S
            theirs_S = engine_logps(path, torch.from_numpy(tokens).long(), fp32_head=fp32_head, fast=fast)
            differences.append((ours_S - theirs_S).abs().mean())
        mismatch[fp32_head] = float(torch.stack(differences).mean())
    # The layers are in bfloat16 in both cases; only the head's part of the mismatch goes.
    assert mismatch[True] < 0.95 * mismatch[False], mismatch


def test_values_of_the_weights_stay_rounded(tmp_path: Path) -> None:
    """Also in the trainer, whose masters are float32: the engine has only the rounded ones."""
    path = write_model(tmp_path, "llama", dtype=torch.float32)
    policy = Policy.load(path, Ranks.alone(), dtype="bfloat16", fp32_head=True)
    head = policy.model.get_output_embeddings()
    seen: list[Tensor] = []
    head.register_forward_hook(lambda module, args, out: seen.append(module.weight.detach().clone()))
    tokens = np.arange(3, 9, dtype=np.int32)
    trajectory = Trajectory(
        tokens=tokens,
        loss_mask=np.ones(6, dtype=np.uint8),
        logprobs=np.zeros(6, dtype=np.float32),
        versions=np.zeros(6, dtype=np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )
    policy(
        collate([TrainingSample(trajectory=trajectory, advantage=1.0, group=0)])
    ).logprobs_S.sum().backward()
    assert seen[0].dtype == torch.bfloat16
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32


def test_the_head_adds_no_rounding() -> None:
    """Against the product in float64 of the same weights and hidden states in bfloat16."""
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 1000, bias=False, dtype=torch.bfloat16)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    hidden = torch.randn(64, 256, dtype=torch.bfloat16)
    want = torch.log_softmax(10 * hidden.double() @ head.weight.detach().double().T, -1)
    errors = []
    for _ in range(2):
        with torch.no_grad():
            got = torch.log_softmax(10 * head(hidden).float(), -1)
        errors.append(float((got - want).abs().max()))
        widen_head(model)
    assert errors[0] > 1e-2 and errors[1] < 1e-4, errors


def test_a_wide_model_is_unchanged(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen2")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    before = model.lm_head(hidden)
    widen_head(model)
    assert torch.equal(model.lm_head(hidden), before)
