"""The engine's core: model paths against transformers, shared prompts, weight swaps, sampler statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceType
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason
from rollout_server.engine import cache
from rollout_server.engine.cache import KVCache
from rollout_server.engine.contexts import LEAST_SHARED_TOKENS
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.base import NewTokens
from rollout_server.engine.models.generic import GenericModel
from rollout_server.engine.models.llama import LlamaModel
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.sampling import Filters, rng_key, sample, uniforms
from rollout_server.engine.scheduler import SamplingParams, Sequence
from tests.support.engine_harness import (
    KINDS,
    load_model,
    reference_greedy,
    reference_logprobs,
    save_model,
    swap,
    weights_of,
)
from tests.support.quick import others_in_chaos

CPU = torch.device("cpu")
FAST = ("llama", "qwen2", "qwen3")


def make_core(
    path: Path,
    *,
    fast: bool = True,
    max_running: int = 8,
    prefix_cache_tokens: int = 1000,
    prefill: int = 8192,
) -> EngineCore:
    model, weights = load(str(path), dtype=torch.float32, device=CPU, context_length=64, allow_fast_path=fast)
    options = EngineOptions(
        max_running_requests=max_running,
        context_length=64,
        prefix_cache_tokens=prefix_cache_tokens,
        max_prefill_tokens=prefill,
    )
    return EngineCore(model, weights, options, version="0")


def submit(core: EngineCore, prompt: SequenceType[int], **params: object) -> Sequence:
    merged = {"max_new_tokens": 10, **params}
    sequence = Sequence(
        seq_id=str(len(core.scheduler.by_id)) + str(prompt),
        prompt=tuple(prompt),
        params=SamplingParams(**merged),
    )  # type: ignore[arg-type]
    core.submit(sequence)
    return sequence


def run(core: EngineCore) -> None:
    while core.all_sequences:
        core.step()
        core.scheduler.check()


def error(path: Path, sequence: Sequence, *, temperature: float = 1.0) -> float:
    want = reference_logprobs(load_model(path), sequence.prompt, sequence.output_ids, temperature=temperature)
    return float(np.abs(want - np.array(sequence.output_logprobs)).max())


@pytest.mark.parametrize(
    ("fast", "kind"),
    others_in_chaos(
        itertools.product((True, False), KINDS),
        quick=[(True, "qwen3"), (True, "qwen2"), (False, "llama"), (False, "gpt2"), (False, "qwen3_moe")],
    ),
)
def test_every_path_matches_transformers(kind: str, fast: bool, tmp_path: Path) -> None:
    """Mixed lengths, temperatures and steps of submission.

    More sequences than rows, so rows are reused and moved.
    """
    path = save_model(tmp_path / kind, kind)
    core = make_core(path, fast=fast, max_running=3)
    assert isinstance(core.model, LlamaModel if fast and kind in FAST else GenericModel)
    prompts = [[5, 6, 7], [9], list(range(3, 25)), [5, 6, 7], [11, 12], list(range(40, 20, -1))]
    temperatures = [1.0, 0.5, 1.0, 2.0, 1.0, 0.0]
    sequences = []
    for i, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True)):
        sequences.append(submit(core, prompt, temperature=temperature, max_new_tokens=4 + 5 * i))
        core.step()
    run(core)
    for sequence, temperature in zip(sequences, temperatures, strict=True):
        assert len(sequence.output_ids) == sequence.params.max_new_tokens
        assert error(path, sequence, temperature=temperature) < 1e-4
    assert sequences[-1].output_ids == reference_greedy(load_model(path), prompts[-1], 29)


SMALL: dict[str, object] = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128,
    "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {}),
        ("gemma2", {"head_dim": 8}),
        ("gpt_oss", {
            "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }),
        ("deepseek_v3", {
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "qk_nope_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        }),
    ],
)  # fmt: skip
def test_generic_path_runs_other_architectures(
    kind: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """Sliding windows, attention sinks, mixture of experts, multi-head latent attention."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).save_pretrained(
        tmp_path / kind
    )
    core = make_core(tmp_path / kind)
    sequences = [
        submit(core, [5, 6, 7], max_new_tokens=15),
        submit(core, list(range(10, 40)), max_new_tokens=8),
    ]
    run(core)
    assert all(error(tmp_path / kind, sequence) < 1e-4 for sequence in sequences)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bloom", {}, "cannot run over our KV cache"),
        ("mamba", {}, "some layers of this model have none"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "attention and Gated DeltaNet only"),
        ("bamba", {
            "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
        }, "this model has another"),
    ],
)  # fmt: skip
def test_architectures_that_cannot_run_are_refused(
    kind: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).save_pretrained(
        tmp_path / kind
    )
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path / kind), dtype=torch.float32, device=CPU, context_length=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_forward_pass_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "m", "llama")
    load(str(path), dtype=dtype, device=CPU, context_length=64)
    monkeypatch.setattr(LlamaModel, "_rotate", lambda self, x, cos, sin: x)
    with pytest.raises(ConfigError, match="does not run exactly on the embedded engine"):
        load(str(path), dtype=dtype, device=CPU, context_length=64)


def test_rounding_of_unlikely_tokens_is_not_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    model = load_model(path)
    with torch.no_grad():
        model.model.norm.weight.mul_(60)  # log-probs down to -297
    model.save_pretrained(path)
    load(str(path), dtype=torch.bfloat16, device=CPU, context_length=64, fp32_head=True)


def test_group_prompt_is_prefilled_once_and_cached(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path, max_running=3)
    group = [submit(core, [5, 6, 7, 8], max_new_tokens=6) for _ in range(8)]
    run(core)
    assert core.contexts.num_prefilled == 3, (
        "all but the last token are computed once, for eight samples in three rows"
    )
    assert core.contexts.num_shared == 7
    assert len({tuple(s.output_ids) for s in group}) > 1 and all(error(path, s) < 1e-4 for s in group)
    core.flush_prefix_cache()
    submit(core, [5, 6, 7, 8])
    run(core)
    assert core.contexts.num_prefilled == 6, "flushed: computed again"


def test_long_prompts_are_admitted_within_the_budget(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path, prefix_cache_tokens=0, prefill=20)
    sequences = [submit(core, [3 + i] * 9, max_new_tokens=20) for i in range(5)]
    core.step()
    assert core.scheduler.num_running == 2, "18 of 20 tokens"
    run(core)
    assert all(error(path, s) < 1e-4 for s in sequences)


def test_the_last_prefill_joins_the_decode_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "m", "qwen3")
    model, weights = load(str(path), dtype=torch.float32, device=CPU, context_length=64)
    model.max_pass_tokens = 20
    alone = []
    compute = model.compute

    def recorded(new: NewTokens, cache: KVCache) -> None:
        alone.append(tuple(new.tokens_BT.shape))
        compute(new, cache)

    monkeypatch.setattr(model, "compute", recorded)
    core = EngineCore(model, weights, EngineOptions(max_running_requests=8, context_length=64), version="0")
    sequences = [submit(core, [3 + i] * 9, max_new_tokens=20) for i in range(5)]
    core.step()
    assert core.scheduler.num_running == 5 and alone == [(2, 8), (2, 8)], "the third is not"
    sequences += [submit(core, [20 + i] * (4 + i), max_new_tokens=9) for i in range(2)]
    run(core)
    assert len(alone) == 2
    assert all(error(path, sequence) < 1e-4 for sequence in sequences)


@pytest.mark.parametrize("recompute", [True, False])
def test_swap_weights_between_steps(recompute: bool, tmp_path: Path) -> None:
    """Log-probs under the recorded versions: exact with recompute, visibly wrong without."""
    paths = [save_model(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1)]
    core = make_core(paths[0])
    sequences = [submit(core, [5, 6, 7 + i], max_new_tokens=20) for i in range(4)]
    for _ in range(7):
        core.step()
    late = submit(core, [5, 6, 7], max_new_tokens=20)
    shadow = core.take_shadow_weights()
    for name, tensor in weights_of(paths[1]).items():
        shadow.named[name].copy_(tensor)
    with torch.inference_mode():
        core.swap_weights(shadow, version="1", recompute=recompute)
    assert core.take_shadow_weights() is not shadow, "the old set is the next shadow"
    run(core)
    worst = 0.0
    for sequence in sequences:
        assert sequence.version_spans == [("0", 0, 7), ("1", 7, 20)]
        got = np.array(sequence.output_logprobs)
        for path, span in zip(paths, (slice(0, 7), slice(7, 20)), strict=True):
            want = reference_logprobs(load_model(path), sequence.prompt, sequence.output_ids)
            worst = max(worst, float(np.abs(want - got)[span].max()))
    assert (worst < 1e-4) is recompute
    assert late.version_spans == [("1", 0, 20)] and error(paths[1], late) < 1e-4, (
        "a prefix computed under the old weights was reused"
    )


def test_preempt_and_abort_keep_sampled_tokens(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path)
    kept, aborted = submit(core, [5, 6], max_new_tokens=12), submit(core, [9], max_new_tokens=12)
    # Reported more than once after it was admitted again.
    kept.stream_interval = 2
    for _ in range(5):
        core.step()
    core.preempt_all()
    assert core.scheduler.num_running == 0 and len(kept.output_ids) == 5
    (ended,) = core.abort([aborted])
    assert (
        ended.finish is not None and ended.finish.reason is FinishReason.ABORT and len(ended.output_ids) == 5
    )
    run(core)
    assert kept.version_spans == [("0", 0, 12)] and error(path, kept) < 1e-4 and error(path, aborted) < 1e-4
    assert core.abort([kept, aborted]) == []


def test_non_finite_logits_end_only_their_sequence(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path)
    shadow = core.take_shadow_weights()
    for name, tensor in weights_of(path).items():
        shadow.named[name].copy_(tensor)
    shadow.named["model.layers.0.self_attn.v_proj.weight"].fill_(float("nan"))
    with torch.inference_mode():
        core.swap_weights(shadow, version="1", recompute=True)
    submit(core, list(range(3, 15)))
    broken = submit(core, list(range(4, 16)))
    run(core)
    assert broken.finish is not None and broken.finish.is_error and broken.output_ids == []
    shadow = core.take_shadow_weights()
    with torch.inference_mode():
        core.swap_weights(shadow, version="2", recompute=True)
    # A longer sequence in the batch, so that positions beyond the short sequence's end are read and masked.
    submit(core, list(range(3, 20)))
    core.step()
    after = submit(core, [5, 6])
    run(core)
    assert error(path, after) < 1e-4, "non-finite values in the row reached its next sequence"


def test_loading_refuses_short_and_missing_models(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    with pytest.raises(ConfigError, match="only 2048 positions"):
        load(str(path), dtype=torch.float32, device=CPU, context_length=4096)
    with pytest.raises(ConfigError, match="model-path"):
        load(str(tmp_path / "absent"), dtype=torch.float32, device=CPU, context_length=64)


def draw(
    logits_V: torch.Tensor, num_draws: int, *, temperature: float = 1.0, filters: Filters | None = None
) -> np.ndarray:
    keys = np.full(num_draws, rng_key(3, 0), np.uint64)
    uniform_N = torch.from_numpy(uniforms(keys, np.arange(num_draws, dtype=np.int64)))
    tokens_N, _ = sample(
        logits_V.expand(num_draws, -1),
        temperature_N=torch.full((num_draws,), temperature),
        uniform_N=uniform_N,
        any_greedy=False,
        any_random=True,
        filters=filters,
    )
    return tokens_N.numpy()


def test_samples_follow_the_distribution() -> None:
    """Chi-squared over 200,000 draws, 19 degrees of freedom: 60 is beyond the 1e-5 quantile.

    A token of probability 0 is never drawn.
    """
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(21, generator=generator)
    logits_V[7] = float("-inf")
    num_draws = 200_000
    for temperature in (1.0, 0.6):
        probs = torch.softmax(logits_V / temperature, -1).numpy()
        counts = np.bincount(draw(logits_V, num_draws, temperature=temperature), minlength=21)
        assert counts[7] == 0
        possible = probs > 0
        expected = probs[possible] * num_draws
        assert ((counts[possible] - expected) ** 2 / expected).sum() < 60


def test_filters_keep_the_right_tokens() -> None:
    logits_V = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]))

    def kept(*, top_p: float = 1.0, top_k: int = 1 << 40, min_p: float = 0.0) -> set[int]:
        filters = Filters(
            top_p_N1=torch.full((2000, 1), top_p),
            top_k_N1=torch.full((2000, 1), top_k),
            min_p_N1=torch.full((2000, 1), min_p),
        )
        return set(draw(logits_V, 2000, filters=filters).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.65) == {0, 1}
    assert kept(min_p=0.3) == {0, 1, 2}
    assert kept(top_p=1e-6) == {0}


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits_NV = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    tokens_N, logprobs_N = sample(
        logits_NV,
        temperature_N=torch.tensor([0.0, 1.0, 0.0, 2.0]),
        uniform_N=torch.tensor([0.9, 0.9, 0.1, 0.5], dtype=torch.float64),
        any_greedy=True,
        any_random=True,
        filters=None,
    )
    assert tokens_N[[0, 2]].tolist() == logits_NV[[0, 2]].argmax(-1).tolist()
    scaled_NV = torch.log_softmax(logits_NV / torch.tensor([[1.0], [1.0], [1.0], [2.0]]), -1)
    assert torch.allclose(logprobs_N, scaled_NV.gather(1, tokens_N[:, None])[:, 0])


def test_random_numbers_differ_by_seed_index_and_position() -> None:
    keys = {rng_key(seed, index) for seed in range(50) for index in range(50)}
    assert len(keys) == 2500
    draws = uniforms(np.array([rng_key(1, 2)] * 1000, np.uint64), np.arange(1000, dtype=np.int64))
    assert (
        len(set(draws.tolist())) == 1000
        and draws.min() >= 0
        and draws.max() < 1
        and abs(draws.mean() - 0.5) < 0.05
    )


def test_rows_in_mapped_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large caches on a CPU: only positions that were written take memory, and all others are zero."""
    monkeypatch.setattr(cache, "_LEAST_MAPPED_BYTES", 0)
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path, max_running=3)
    assert all(not keys.any() for keys in core._cache.keys)
    sequences = [submit(core, [5, 6, 7 + i % 2], max_new_tokens=12) for i in range(5)]
    run(core)
    assert all(error(path, sequence) < 1e-4 for sequence in sequences)
    assert all(keys.any() for keys in core._cache.keys)


@pytest.mark.parametrize("fast", [True, False])
def test_a_recomputed_group_shares_its_prompt(fast: bool, tmp_path: Path) -> None:
    """After an update a long prompt is computed once for the samples that have it and output already."""
    paths = [save_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (0, 1)]
    core = make_core(paths[0], max_running=6, fast=fast)
    prompt = list(range(3, 3 + LEAST_SHARED_TOKENS))
    group = [submit(core, prompt, max_new_tokens=8 + i) for i in range(4)]
    group += [submit(core, prompt[:-1], max_new_tokens=12), submit(core, [*prompt, 9], max_new_tokens=14)]
    for _ in range(5):
        core.step()
    swap(core, paths[1], recompute=True)
    late = submit(core, prompt, max_new_tokens=7)
    before = core.contexts.num_prefilled
    run(core)
    # Of four prompts, one; of each sequence of the group, five tokens; the two others as a whole.
    alone = sum(len(sequence.prompt) - 1 + 5 for sequence in group[4:])
    assert core.contexts.num_prefilled - before == len(prompt) - 1 + 4 * 5 + alone
    for sequence in group:
        want = reference_logprobs(load_model(paths[1]), sequence.prompt, sequence.output_ids)
        assert np.abs(want - np.array(sequence.output_logprobs))[5:].max() < 1e-4
    assert late.version_spans == [("1", 0, 7)] and error(paths[1], late) < 1e-4
