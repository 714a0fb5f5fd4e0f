"""Weights in bfloat16 that a CPU's kernels have packed: the same numbers, also after pushes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from areal_like.weights.buckets import cut_buckets, flatten, spec_of
from areal_like.weights.integrity import sha256
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models import packed
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.engine.weights.bucket_receiver import BucketReceiver
from tests.rollout_server.engine.test_bucket_receiver import receive
from tests.support.engine_harness import load_model, reference_logprobs, save_model, weights_of

CPU = torch.device("cpu")
TOKENS = tuple(range(3, 30))
pytestmark = pytest.mark.skipif(
    not packed.can_pack(dtype=torch.bfloat16, device=CPU), reason="this CPU is not fast in bfloat16"
)


def _core(path: Path, *, dtype: torch.dtype = torch.bfloat16) -> EngineCore:
    model, weights = load(str(path), dtype=dtype, device=CPU, context_length=64, fp32_head=True)
    options = EngineOptions(max_running_requests=4, context_length=64)
    return EngineCore(model, weights, options, version="0")


def _logprobs(core: EngineCore) -> NDArray[np.float64]:
    return core.score(list(TOKENS), first=4).astype(np.float64)


def test_norms_are_rounded_as_in_the_trainer(tmp_path: Path) -> None:
    """To the last bit, but for the order of a sum; F.rms_norm, which rounds once, differs in many numbers."""
    model = _core(save_model(tmp_path, "llama")).model
    torch.manual_seed(0)
    size = model._config.hidden_size  # type: ignore[attr-defined]
    x, weight = torch.randn(64, size).bfloat16(), torch.randn(size).bfloat16()
    norm = LlamaRMSNorm(size, eps=model._eps)  # type: ignore[attr-defined]
    norm.weight.data = weight
    want = norm(x)
    found = model._rms_norm(x, weight)  # type: ignore[attr-defined]
    once = torch.nn.functional.rms_norm(x, (size,), weight, norm.variance_epsilon)
    assert (found != want).float().mean() < 1e-2 < (once != want).float().mean()


def _exact(path: Path) -> NDArray[np.float64]:
    """Of the weights rounded to bfloat16, computed in float32."""
    model = load_model(path)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return np.asarray(reference_logprobs(model, TOKENS[:4], TOKENS[4:]), np.float64)


def test_products_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(96, 40, generator=generator).bfloat16()
    bias_O, out_5O = torch.randn(96, generator=generator).bfloat16(), torch.ones(5, 96).bfloat16()
    copy_OI = packed.packed(weight_OI)
    for num_rows in (1, 5, 64, 200):
        x_NI = torch.randn(num_rows, 40, generator=generator).bfloat16()
        exact_NO = x_NI.double() @ weight_OI.double().T
        step = 2.0**-8 * float(exact_NO.abs().max())
        torch.testing.assert_close(packed.linear(x_NI, copy_OI).double(), exact_NO, atol=step, rtol=0)
        biased_NO = packed.linear(x_NI, copy_OI, bias_O).double()
        torch.testing.assert_close(biased_NO, exact_NO + bias_O.double(), atol=2 * step, rtol=0)
        wide_NO = packed.fp32_linear(x_NI, copy_OI)
        assert wide_NO.dtype == torch.float32
        torch.testing.assert_close(wide_NO.double(), exact_NO, atol=2.0**-8 * step, rtol=0)
    added_5O = packed.added(out_5O, x_NI[:5], copy_OI).double()
    torch.testing.assert_close(added_5O, exact_NO[:5] + 1, atol=2 * step, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_log_probs_are_as_exact_as_unpacked_ones(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / kind, kind)
    ours = _core(path)
    monkeypatch.setattr(packed, "can_pack", lambda **_: False)
    theirs = _core(path)
    assert ours.model.copies_weights and not theirs.model.copies_weights
    exact = _exact(path)
    errors = [float(np.abs(_logprobs(core) - exact).mean()) for core in (ours, theirs)]
    assert 0 < errors[0] < 1.25 * errors[1] < 0.1, errors


def _filled(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_a_push_is_attested_and_takes_effect_as_a_whole(tmp_path: Path) -> None:
    paths = [save_model(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1)]
    core = _core(paths[0])
    before, tensors = _logprobs(core), weights_of(paths[1])
    shadow = core.take_shadow_weights()
    buckets = cut_buckets([spec_of(n, t, dtype="bfloat16") for n, t in tensors.items()], bucket_bytes=1 << 12)
    flats = [flatten(bucket, tensors) for bucket in buckets]
    receiver = BucketReceiver(shadow, core.model.facts, [])
    sums = receive(receiver, buckets, flats)
    assert sums.digests == list(map(sha256, flats)) and not receiver.error
    assert _filled(shadow.named, tensors)
    np.testing.assert_array_equal(_logprobs(core), before)  # nothing reads the set before the swap
    with torch.inference_mode():
        core.swap_weights(shadow, version="1", recompute=True)
    after = _logprobs(core)
    np.testing.assert_array_equal(after, _logprobs(_core(paths[1])))
    assert np.abs(after - before).mean() > 0.1
    assert np.abs(after - _exact(paths[1])).mean() < 0.1
    # The model has its own copy, so the same memory receives the next push, whatever becomes of that.
    assert core.take_shadow_weights() is shadow
    assert shadow.arena is not None
    with torch.inference_mode():
        shadow.arena.fill_(255)  # NaN
    sequence = Sequence(seq_id="a", prompt=TOKENS, params=SamplingParams(max_new_tokens=4))
    core.submit(sequence)
    while core.all_sequences:
        core.step()
    assert len(sequence.output_ids) == 4 and np.isfinite(sequence.output_logprobs).all()
    np.testing.assert_array_equal(_logprobs(core), after)
