"""The head in float32: products and gradients, in chunks and on ranks, and its agreement with the engine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.cpus import cpu_flags, fast_bfloat16
from areal_like.precision import Fp32Head, fp32_operand, widen_head
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.engine.cache import KVCache
from rollout_server.engine.models.loading import load
from tests.support.fp32_head_ranks import batch_of, load_policy, whole_gradient
from tests.support.trainer_helpers import VOCAB, run_ranks, write_model
from trainer.attention import packed_attention
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.models.reward_model import RewardModel
from trainer.models.value_model import ValueModel

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


@pytest.mark.chaos
@pytest.mark.parametrize("fast", [True, False], ids=["llama", "generic"])
def test_mismatch_in_bfloat16_is_smaller_with_it(
    tmp_path: Path, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the trainer's attention in bfloat16 too, as the engine's: on a CPU it is in float32 for short
    sequences."""
    monkeypatch.setattr(packed_attention, "_SHORT", 0)
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
    if fast:  # the layers are in bfloat16 in both cases; only the head's part of the mismatch goes
        assert mismatch[True] < 0.95 * mismatch[False], mismatch
    else:  # both sides run transformers' layers
        assert mismatch[True] < 1e-6, mismatch


def trained_head(path: str, *, chunk_tokens: int, fp32_head: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs [S], hidden states [S, D] in bfloat16, the head's gradient) of one batch in bfloat16."""
    policy = Policy.load(
        path,
        Ranks.alone(),
        dtype="bfloat16",
        chunk_tokens=chunk_tokens,
        fp32_head=fp32_head,
        temperature=0.7,
    )
    head = policy.model.get_output_embeddings()
    chunks: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, inputs, out: chunks.append(inputs[0].detach()))
    logp_S = policy(batch_of(0)).logprobs_S
    hook.remove()
    assert max(map(len, chunks)) <= chunk_tokens
    (weights(logp_S) * logp_S).sum().backward()
    assert head.weight.grad.dtype == torch.float32
    return logp_S.detach(), torch.cat(chunks), local(head.weight.grad)


def weights(logp_S: Tensor) -> Tensor:
    """Coefficients of both signs, so that the gradient is not a sum of equal terms."""
    return torch.linspace(-1.0, 1.5, len(logp_S))


def test_any_chunks_give_the_numbers_of_float64(tmp_path: Path) -> None:
    """The reference has the same rounded operands, and the gradient is rounded once, whatever the chunks."""
    path = write_model(tmp_path, "qwen3", dtype=torch.float32)
    weight_VD = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).lm_head.weight.detach()
    batch = batch_of(0)
    num_sampled = len(batch.sampled_S)
    targets_S = batch.tokens_T[batch.sampled_S]
    found = {n: trained_head(path, chunk_tokens=n) for n in (1, 7, num_sampled - 1, num_sampled, 1000)}
    for logp_S, hidden_SD, grad_VD in found.values():
        logits_SV = (hidden_SD.double() @ weight_VD.double().T / 0.7).requires_grad_()
        want_S = torch.log_softmax(logits_SV, -1).gather(1, targets_S[:, None])[:, 0]
        (logits_grad_SV,) = torch.autograd.grad((weights(want_S) * want_S).sum(), logits_SV)
        want_VD = logits_grad_SV.T @ hidden_SD.double() / 0.7
        torch.testing.assert_close(logp_S.double(), want_S.detach(), rtol=0, atol=2e-6)
        # The logits' gradient and the sum are rounded to 8 bits, each of them once.
        assert float((grad_VD - want_VD).norm() / want_VD.norm()) < 2**-8
    for _, _, grad_VD in found.values():
        whole_VD = found[1000][2]
        torch.testing.assert_close(grad_VD, whole_VD, rtol=2**-7, atol=1e-6 * float(whole_VD.abs().max()))


def test_chunks_add_no_noise_to_the_gradient(tmp_path: Path) -> None:
    """Without it, the sum over chunks is rounded to bfloat16 after each of them."""
    path = write_model(tmp_path, "qwen3", dtype=torch.float32)
    noise = {}
    for fp32_head in (False, True):
        one, many = (trained_head(path, chunk_tokens=n, fp32_head=fp32_head)[2] for n in (1000, 1))
        noise[fp32_head] = float((many - one).norm() / one.norm())
    assert noise[True] < 0.3 * noise[False], noise


def test_gradient_of_the_hidden_states() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 300, dtype=torch.bfloat16)
    widen_head(SimpleNamespace(get_output_embeddings=lambda: head))
    hidden = torch.randn(2, 9, 64, dtype=torch.bfloat16, requires_grad=True)
    out_grad = torch.randn(2, 9, 300).bfloat16()
    logits = head(hidden)
    logits.backward(out_grad.float())
    assert logits.dtype == torch.float32 and hidden.grad is not None
    want = out_grad.double() @ head.weight.detach().double()
    torch.testing.assert_close(hidden.grad.double(), want, rtol=2**-8, atol=1e-6)
    want = out_grad.flatten(0, 1).double().T @ hidden.detach().flatten(0, 1).double()
    assert head.weight.grad is not None and head.bias.grad is not None
    torch.testing.assert_close(head.weight.grad.double(), want, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(head.bias.grad.double(), out_grad.double().sum((0, 1)), rtol=2**-8, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    head = torch.nn.Linear(8, 30, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    widen_head(SimpleNamespace(get_output_embeddings=lambda: head))
    assert isinstance(head, Fp32Head) and head.gradient_sum() is None
    hidden = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None


@pytest.mark.chaos
def test_two_ranks_give_the_gradient_of_one(tmp_path: Path, ranks: Ranks) -> None:
    """For a head of its own and for one that is tied to the embedding."""
    for architecture in ("qwen3", "llama"):
        out = tmp_path / architecture
        path = write_model(out, architecture, dtype=torch.float32)
        run_ranks("gradient", str(out), path, world_size=2, module="tests.support.fp32_head_ranks")
        policy = load_policy(path, ranks)
        for rank in range(2):
            policy(batch_of(rank)).logprobs_S.sum().backward()
        got, want = load_file(out / "gradient.safetensors"), whole_gradient(policy)
        assert got.keys() == want.keys()
        for name, grad in got.items():
            # Sums of the same numbers in bfloat16, in another order.
            assert float((grad - want[name]).norm() / want[name].norm()) < 1e-2, name
            assert float(grad.norm()) > 0, name


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
    # 16 bits at least: a fast CPU has no more. The logits are up to 20 here.
    assert errors[0] > 5e-2 and errors[1] < 4e-4, errors


def test_a_wide_model_is_unchanged(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen2")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    before = model.lm_head(hidden)
    widen_head(model)
    assert torch.equal(model.lm_head(hidden), before)


@pytest.mark.skipif(not fast_bfloat16(cpu_flags()), reason="this CPU is not fast in bfloat16")
def test_a_fast_cpu_splits_large_products() -> None:
    """Two products in bfloat16 have 16 bits; the narrow gradient is rounded once."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(9000, 96, generator=generator).bfloat16().requires_grad_()
    hidden_ND = torch.randn(40, 96, generator=generator).bfloat16().requires_grad_()
    factor_NV = torch.randn(40, 9000, generator=generator)
    head = Fp32Head(96, 9000, bias=False)
    head.weight = torch.nn.Parameter(weight_VD.detach())
    logits_NV = head(hidden_ND)
    exact_NV = (hidden_ND.double() @ weight_VD.double().T).detach()
    assert logits_NV.dtype == torch.float32
    size = float(exact_NV.abs().max())
    rounded = float((exact_NV - exact_NV.bfloat16().double()).abs().max())
    error = float((logits_NV.detach().double() - exact_NV).abs().max())
    assert 0 < error < 2.0**-16 * size < 0.05 * rounded
    (logits_NV * factor_NV).sum().backward()
    narrow_NV = factor_NV.bfloat16().double()
    for found, exact in (
        (hidden_ND.grad, narrow_NV @ weight_VD.detach().double()),
        (head.weight.grad, narrow_NV.T @ hidden_ND.detach().double()),
    ):
        assert found is not None and found.dtype == torch.bfloat16
        assert float((found.double() - exact).norm() / exact.norm()) < 2.0**-8
    assert fp32_operand(torch.zeros(1 << 15, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert fp32_operand(torch.zeros(100, 96, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("cls", [RewardModel, ValueModel])
def test_scores_and_values_of_a_bfloat16_model_are_float32(
    cls: type[RewardModel] | type[ValueModel], tmp_path: Path
) -> None:
    path = write_model(tmp_path, "qwen3", dtype=torch.bfloat16)
    model = cls.load(path, Ranks.alone(), dtype="bfloat16")
    head: Any = model.model.get_submodule("score" if cls is RewardModel else "lm_head")
    with torch.no_grad():
        local(head.weight).normal_(generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    head.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].detach(), out.detach())))
    value_S = model(batch_of(0))
    hidden_SD, out_S1 = seen
    weight_1D = local(head.weight).detach().bfloat16().float()
    assert hidden_SD.dtype == torch.bfloat16 and out_S1.dtype == torch.float32
    assert torch.allclose(out_S1, hidden_SD.float() @ weight_1D.T, rtol=1e-5, atol=1e-6)
    assert (value_S.bfloat16().float() != value_S).any()
    value_S.sum().backward()
    assert local(head.weight.grad).abs().sum() > 0
