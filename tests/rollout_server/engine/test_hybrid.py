"""Models with recurrent states beside KV, and others of the generic path, against transformers unbatched.

A row's state must never depend on padding, on another row or on the row's earlier sequence: every test has
more sequences than rows, or contexts of different lengths in one pass, and compares all log-probs.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence as SequenceType
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import DynamicCache

from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.generic import GenericModel
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from tests.support.adapters import make_adapter
from tests.support.engine_harness import load_model, reference_logprobs, swap
from tests.support.families import HYBRIDS
from tests.support.hybrid_models import FAMILIES, write_families, write_family
from tests.support.quick import only_in_chaos, others_in_chaos

CPU = torch.device("cpu")
CONTEXT = 128
TOLERANCE = 1e-5
LONG = [3 + 7 * i % 90 for i in range(75)]
"""More tokens than transformers takes in one chunk of linear attention (64)."""
QUICK = ("qwen3_next", "olmo_hybrid", "deepseek_v3", "glm4_moe")
"""Two with linear attention, one of them with experts; latents; and attention with biased routers."""

_names = itertools.count()


def make_core(path: Path, *, max_running: int = 3, **options: Any) -> EngineCore:
    model, weights = load(str(path), dtype=torch.float32, device=CPU, context_length=CONTEXT)
    return EngineCore(
        model,
        weights,
        EngineOptions(max_running_requests=max_running, context_length=CONTEXT, **options),
        version="0",
    )


def submit(
    core: EngineCore, prompt: SequenceType[int], num_tokens: int, *, keeps: bool = False, greedy: bool = False
) -> Sequence:
    sequence = Sequence(
        seq_id=str(next(_names)),
        prompt=tuple(prompt),
        params=SamplingParams(max_new_tokens=num_tokens, temperature=0.0 if greedy else 1.0),
        keeps_prefix=keeps,
    )
    core.submit(sequence)
    return sequence


def run(core: EngineCore, *, steps: int = 1000) -> None:
    while core.all_sequences and steps:
        core.step()
        core.scheduler.check()
        core.contexts.kept.check()
        steps -= 1


def errors(model: Any, sequence: Sequence) -> NDArray[np.float32]:
    """|difference| of each token's log-prob to transformers' forward over this sequence alone."""
    want = reference_logprobs(model, sequence.prompt, sequence.output_ids)
    return np.abs(want - np.array(sequence.output_logprobs, np.float32))


@pytest.mark.parametrize("family", others_in_chaos(FAMILIES, quick=QUICK))
def test_logprobs_and_greedy_tokens(family: str, tmp_path: Path) -> None:
    """Contexts of 1 to 75 tokens in common passes, rows reused and moved, a sequence retracted."""
    path = write_family(family, tmp_path / family)
    core, model = make_core(path), load_model(path)
    assert isinstance(core.model, GenericModel)
    prompts = [[5, 6, 7], [9], LONG, [5, 6, 7], [11, 12], list(range(40, 20, -1)), [13]]
    greedy = []
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(submit(core, prompt, 3 + 4 * i, greedy=i % 3 == 2))
        greedy += sequences[-1:] if i % 3 == 2 else []
        core.step()
    core.preempt_all()
    run(core)
    for sequence in sequences:
        assert len(sequence.output_ids) == sequence.params.max_new_tokens
        if sequence in greedy:
            num_tokens = len(sequence.output_ids)
            theirs = model.generate(
                torch.tensor([sequence.prompt]),
                do_sample=False,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert sequence.output_ids == theirs[0, -num_tokens:].tolist()
        else:
            assert errors(model, sequence).max() < TOLERANCE
    for sequence in (sequences[3], sequences[6]):
        scored = core.score([*sequence.prompt, *sequence.output_ids], first=len(sequence.prompt))
        assert np.abs(scored - sequence.output_logprobs).max() < TOLERANCE


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_group_shares_the_state_after_its_prompt(family: str, tmp_path: Path) -> None:
    path = write_family(family, tmp_path / family)
    core, model = make_core(path), load_model(path)
    group = [submit(core, LONG, 6) for _ in range(7)]
    other = submit(core, LONG[:-1], 6)
    run(core)
    assert core.contexts.num_prefilled == len(LONG) - 1 + len(LONG) - 2
    assert core.contexts.num_shared == 6
    assert len({tuple(sequence.output_ids) for sequence in group}) > 1
    assert max(errors(model, sequence).max() for sequence in (*group, other)) < TOLERANCE
    core.flush_prefix_cache()
    again = submit(core, LONG, 6)
    run(core)
    assert core.contexts.num_shared == 6 and errors(model, again).max() < TOLERANCE


def test_turns_continue_from_the_last_state(tmp_path: Path) -> None:
    path = write_family("qwen3_next", tmp_path / "m")
    core, model = make_core(path, max_running=4), load_model(path)
    said = [list(range(5, 8)), LONG[:30], [9], list(range(5, 8))]
    for turn in range(3):
        before = core.contexts.num_prefilled
        turns = [submit(core, tokens, 4 + i, keeps=True) for i, tokens in enumerate(said)]
        run(core)
        assert max(errors(model, sequence).max() for sequence in turns) < TOLERANCE
        if turn:
            # Each turn computes the last sampled token, and the 1 + turn tokens of the new message but one.
            assert core.contexts.num_prefilled - before == 4 * (1 + turn)
            assert all(s.num_cached_tokens == len(s.prompt) - 2 - turn for s in turns)
        said = [[*s.prompt, *s.output_ids, *range(30, 32 + turn)] for s in turns]
    assert core.contexts.num_continued >= 8
    # From the middle of a turn only the prompt is known, and an edited prompt is computed from its beginning.
    first = turns[1]
    branch = submit(core, [*first.prompt, *first.output_ids[:2], 40], 5, keeps=True)
    edited = submit(core, [*LONG[:20], 50, 51], 5, keeps=True)
    run(core)
    assert (branch.num_cached_tokens, edited.num_cached_tokens) == (29, 0)
    assert max(errors(model, sequence).max() for sequence in (branch, edited)) < TOLERANCE


def test_a_group_starts_from_a_kept_prompt(tmp_path: Path) -> None:
    path = write_family("qwen3_5_text", tmp_path / "m")
    core, model = make_core(path), load_model(path)
    group = [submit(core, LONG, 5 + i, keeps=True) for i in range(5)]
    run(core)
    late = submit(core, LONG, 5, keeps=True)
    run(core)
    assert core.contexts.num_prefilled == len(LONG) - 1
    assert late.num_cached_tokens == len(LONG) - 1
    assert max(errors(model, sequence).max() for sequence in (*group, late)) < TOLERANCE


def test_a_long_turn_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few tokens, whose state comes from the part before."""
    monkeypatch.setattr("rollout_server.engine.contexts.MAX_SCORES", 300)
    path = write_family("qwen3_5_text", tmp_path / "m")
    core, model = make_core(path, max_running=4), load_model(path)
    said = [list(range(5, 12 + i)) for i in range(4)]
    for new in (20, 17):
        turns = [submit(core, tokens, 3, keeps=True) for tokens in said]
        run(core)
        assert max(errors(model, sequence).max() for sequence in turns) < TOLERANCE
        said = [[*s.prompt, *s.output_ids, *range(30, 30 + new - 5 * i)] for i, s in enumerate(turns)]
    assert core.contexts.num_continued == 4


@pytest.mark.parametrize("family", HYBRIDS)
def test_an_update_recomputes_the_state(family: str, tmp_path: Path) -> None:
    paths = write_families(family, tmp_path)
    models = [load_model(path) for path in paths]
    core = make_core(paths[0])
    sequences = [submit(core, LONG[: 5 * i + 1], 16) for i in range(3)]
    run(core, steps=6)
    swap(core, paths[1], version="1", recompute=True)
    late = submit(core, LONG, 6)
    run(core)
    for sequence in sequences:
        assert sequence.version_spans == [("0", 0, 6), ("1", 6, 16)]
        assert errors(models[0], sequence)[:6].max() < TOLERANCE
        assert errors(models[1], sequence)[6:].max() < TOLERANCE
    assert errors(models[1], late).max() < TOLERANCE


@torch.inference_mode()
def kept_logprobs(models: SequenceType[Any], sequence: Sequence, *, switch: int) -> NDArray[np.float32]:
    """Log-probs of the output if the cache of transformers is kept while the weights change, after `switch`
    tokens: float32[len(output)]."""
    prompt, output = list(sequence.prompt), sequence.output_ids
    cache = DynamicCache(config=models[0].config)
    first = torch.tensor([[*prompt, *output[: switch - 1]]])
    rows = list(models[0](input_ids=first, past_key_values=cache).logits[0, len(prompt) - 1 :])
    for token in output[switch - 1 : -1]:
        rows.append(models[1](input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    logprobs_TV = torch.log_softmax(torch.stack(rows), -1)
    chosen: NDArray[np.float32] = logprobs_TV[torch.arange(len(output)), torch.tensor(output)].numpy()
    return chosen


@pytest.mark.parametrize("family", HYBRIDS)
def test_an_update_keeps_the_state(family: str, tmp_path: Path) -> None:
    paths = write_families(family, tmp_path)
    models = [load_model(path) for path in paths]
    core = make_core(paths[0])
    sequences = [submit(core, LONG[: 5 * i + 2], 16, keeps=True) for i in range(3)]
    run(core, steps=6)
    swap(core, paths[1], version="1", recompute=False)
    run(core)
    for sequence in sequences:
        assert sequence.version_spans == [("0", 0, 6), ("1", 6, 16)]
        want = kept_logprobs(models, sequence, switch=6)
        assert np.abs(want - sequence.output_logprobs).max() < TOLERANCE
        assert errors(models[1], sequence)[6:].max() > 10 * TOLERANCE  # the old state matters
    # A state of two versions is not kept for the next turn.
    late = submit(core, [*sequences[2].prompt, *sequences[2].output_ids, 9], 6, keeps=True)
    run(core)
    assert late.num_cached_tokens == 0 and errors(models[1], late).max() < TOLERANCE


@pytest.mark.parametrize("kept_tokens", [*only_in_chaos(0), 150, *only_in_chaos(None)])
def test_random_requests_have_right_logprobs(kept_tokens: int | None, tmp_path: Path) -> None:
    """Conversations, groups, aborts, retractions, updates and flushes in any order on three rows."""
    paths = write_families("qwen3_5_text", tmp_path)
    models = [load_model(path) for path in paths]
    rng = random.Random(repr(kept_tokens))
    core = make_core(paths[0], prefix_cache_tokens=150, conversation_cache_tokens=kept_tokens)
    version, sequences = 0, list[Sequence]()
    for _ in range(130):
        kind = rng.choices(
            ["step", "start", "group", "turn", "abort", "swap", "preempt", "flush"],
            [30, 5, 2, 10, 3, 1, 1, 1],
        )[0]
        open_now = [sequence for sequence in sequences if sequence.finish is None]
        ended = [sequence for sequence in sequences if sequence.finish is not None]
        if kind in ("start", "group"):
            prompt = [rng.randint(3, 6) for _ in range(rng.randint(1, 9))]
            number = 4 if kind == "group" else 1
            keeps = rng.random() < 0.5
            sequences += [submit(core, prompt, rng.randint(1, 7), keeps=keeps) for _ in range(number)]
        elif kind == "turn" and ended:
            last = rng.choice(ended[-5:])
            said = [*last.prompt, *last.output_ids, *(rng.randint(3, 6) for _ in range(rng.randint(0, 4)))]
            sequences.append(submit(core, said[: CONTEXT - 8], rng.randint(1, 7), keeps=True))
        elif kind == "abort" and open_now:
            core.abort([rng.choice(open_now)])
        elif kind == "swap":
            version += 1
            swap(core, paths[version % 2], version=str(version), recompute=True)
        elif kind == "preempt":
            core.preempt_all()
        elif kind == "flush":
            core.flush_prefix_cache()
        else:
            run(core, steps=1)
    run(core)
    assert len(sequences) > 20 and version and (core.contexts.num_continued > 3) == (kept_tokens != 0)
    for sequence in sequences:
        for number, start, end in sequence.version_spans:
            assert errors(models[int(number) % 2], sequence)[start:end].max() < TOLERANCE


def test_float32_parts_in_bfloat16(tmp_path: Path) -> None:
    """Vectors of linear attention that a checkpoint stores in float32 stay so, and states always are."""
    path = write_family("qwen3_5_text", tmp_path / "m")
    saved = load_file(path / "model.safetensors")
    model, weights = load(str(path), dtype=torch.bfloat16, device=CPU, context_length=CONTEXT, fp32_head=True)
    stays = {name for name, tensor in weights.named.items() if tensor.dtype == torch.float32}
    assert len(stays) == 6
    assert stays == {name for name in saved if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight"))}
    assert all(torch.equal(weights.named[name], saved[name]) for name in stays)
    core = EngineCore(
        model, weights, EngineOptions(max_running_requests=2, context_length=CONTEXT), version="0"
    )
    sequences = [submit(core, LONG[: 20 * i + 3], 12) for i in range(4)]
    run(core)
    # Rounding alone moves a log-prob of these models by about 0.02.
    reference = load_model(path)
    assert max(errors(reference, sequence).mean() for sequence in sequences) < 0.1
    cache = model.facts.new_cache(num_rows=2, context_length=8)
    assert cache.states is not None and {m.dtype for m in cache.states.matrices_SHKV} == {torch.float32}
    with torch.inference_mode():
        logits_NV = model.decode(torch.tensor([3, 4]), cache.begin_decode(np.array([0, 0])), cache)
    assert logits_NV.dtype == torch.float32
    narrow = write_family("qwen3_5_text", tmp_path / "narrow", dtype=torch.bfloat16)
    _, weights = load(str(narrow), dtype=torch.bfloat16, device=CPU, context_length=CONTEXT)
    assert {tensor.dtype for tensor in weights.named.values()} == {torch.bfloat16}


def test_an_adapter_of_linear_attention(tmp_path: Path) -> None:
    """Also of the gates, whose padding is closed after the adapter's product."""
    path = write_family("qwen3_5_text", tmp_path / "m")
    targets = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj")
    adapter = make_adapter(path, seed=1, targets=targets)
    core = make_core(path, max_adapters=2)
    tensors = core.new_adapter(adapter.header)
    for name, tensor in tensors.items():
        tensor.copy_(adapter.tensors[name])
    base = submit(core, LONG[:9], 12)
    run(core, steps=3)
    core.activate_adapter(tensors, version="1", running="finish")
    sequences = [submit(core, LONG[: 20 * i + 1], 8) for i in range(4)]
    run(core)
    assert errors(load_model(path), base).max() < TOLERANCE
    assert max(errors(adapter.model, sequence).max() for sequence in sequences) < TOLERANCE


def test_states_count_as_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_family("qwen3_5_text", tmp_path / "m")
    core = make_core(path, max_running=2)
    num_channels, heads, key_dim, value_dim = 2 * 8 + 5 * 6, 5, 8, 6
    # Two layers, four bytes a number; every tensor begins at a multiple of 64 bytes.
    state = 2 * sum(-(-4 * size // 64) * 64 for size in (num_channels * 4, heads * key_dim * value_dim))
    token = 4 * 2 * 2 * 16
    assert core.state_bytes == 2 * state and core.kv_bytes == 2 * CONTEXT * token
    size = -(-state // token)
    # Room for one prompt with its state and a half: the group's prompt is found, then the other one's.
    core = make_core(path, max_running=1, prefix_cache_tokens=10 + size + size // 2)
    for prompt in (LONG[:10], LONG[10:20], LONG[10:20], LONG[:10]):
        submit(core, prompt, 2)
        run(core)
    assert core.contexts.num_shared == 1
    with caplog.at_level(logging.WARNING):
        core = make_core(path, prefix_cache_tokens=size, conversation_cache_tokens=0)
    assert [record.message for record in caplog.records] == [
        f"prefix_cache_tokens={size} keeps nothing: a recurrent state of this model takes as much memory as "
        f"{size} tokens"
    ]
