"""The embedded engine's routes are transformers' own choices, each of the first pass over its token."""

from __future__ import annotations

import base64
from collections.abc import Sequence as SequenceType
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.wire.routes import RoutesShape
from rollout_server.engine.core import EngineCore
from rollout_server.engine.http.protocol import packed_sequence, sequence_json
from rollout_server.engine.loop import SequenceOutput
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.policy.routes import RoutesReader
from tests.support.engine_harness import load_model, save_model, swap

CPU = torch.device("cpu")
CONTEXT = 64


def make_core(path: Path, *, max_running: int = 4, records: bool = True) -> EngineCore:
    model, weights = load(
        str(path), dtype=torch.float32, device=CPU, context_length=CONTEXT, records_routes=records
    )
    options = EngineOptions(max_running_requests=max_running, context_length=CONTEXT)
    return EngineCore(model, weights, options, version="0")


def submit(
    core: EngineCore,
    prompt: SequenceType[int],
    num_tokens: int,
    *,
    keeps: bool = False,
    returns_routes: bool = True,
) -> Sequence:
    sequence = Sequence(
        seq_id=f"{len(core.scheduler.by_id)}.{core.num_steps}.{len(prompt)}",
        prompt=tuple(prompt),
        params=SamplingParams(max_new_tokens=num_tokens),
        keeps_prefix=keeps,
        return_routes=returns_routes,
    )
    core.submit(sequence)
    return sequence


def run(core: EngineCore) -> None:
    while core.all_sequences:
        core.step()


@torch.inference_mode()
def reference(model: Any, sequence: Sequence) -> NDArray[np.int64]:
    """[T, L, K]: transformers' choices for all tokens but the last, each sorted."""
    tokens = torch.tensor([[*sequence.prompt, *sequence.output_ids]])
    logits = model(input_ids=tokens, output_router_logits=True, use_cache=False).router_logits
    chosen = [layer_NE.topk(model.config.num_experts_per_tok, -1).indices for layer_NE in logits]
    return torch.stack(chosen, 1).sort(-1).values[:-1].numpy()


def routes_of(sequence: Sequence) -> NDArray[np.int64]:
    """[T, L, K]: the routes of an ended sequence, each sorted."""
    assert sequence.finish is not None and sequence.routes_TLK is not None
    assert sequence.routes_TLK.dtype == np.uint8
    assert len(sequence.routes_TLK) == len(sequence.prompt) + len(sequence.output_ids) - 1
    return np.sort(sequence.routes_TLK.astype(np.int64), -1)


def test_routes_are_those_of_transformers(tmp_path: Path) -> None:
    """Groups, prompts of different lengths, and more sequences than rows, so that rows are moved."""
    path = save_model(tmp_path / "m", "qwen3_moe")
    core, model = make_core(path), load_model(path)
    prompts = [[5, 6, 7], [9], list(range(3, 25)), [5, 6, 7], [5, 6, 7], list(range(40, 20, -1))]
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(submit(core, prompt, 4 + 5 * i))
        core.step()
    unasked = submit(core, [8, 9], 5, returns_routes=False)
    run(core)
    assert core.contexts.num_shared >= 2, "the prompt of the group was computed once"
    for sequence in sequences:
        assert np.array_equal(routes_of(sequence), reference(model, sequence))
    assert unasked.routes_TLK is None


def test_turns_of_a_conversation_have_all_routes(tmp_path: Path) -> None:
    """Kept prefixes, extensions of them, and branches."""
    path = save_model(tmp_path / "m", "qwen3_moe")
    core, model = make_core(path), load_model(path)
    said = [list(range(5, 8)), list(range(5, 20)), [9], list(range(5, 8))]
    for turn in range(3):
        turns = [submit(core, tokens, 4 + i, keeps=True) for i, tokens in enumerate(said)]
        run(core)
        for sequence in turns:
            assert np.array_equal(routes_of(sequence), reference(model, sequence))
        said = [
            [*sequence.prompt, *sequence.output_ids, *range(30, 33 + turn + 3 * i)]
            for i, sequence in enumerate(turns)
        ]
    assert core.contexts.num_continued >= 8


@pytest.mark.parametrize("recompute", [True, False])
def test_a_push_changes_no_earlier_routes(recompute: bool, tmp_path: Path) -> None:
    paths = [save_model(tmp_path / str(seed), "qwen3_moe", seed=seed) for seed in (0, 1)]
    old, new = map(load_model, paths)
    core = make_core(paths[0])
    sequences = [submit(core, [5, 6, 7 + i], 20, keeps=True) for i in range(4)]
    for _ in range(7):
        core.step()
    swap(core, paths[1], recompute=recompute)
    for _ in range(3):
        core.step()
    core.preempt_all()  # a second time, with routes of two versions
    run(core)
    first = 3 + 7 - 1
    """Tokens that went through the old weights."""
    num_different = 0
    for sequence in sequences:
        got, by_old, by_new = routes_of(sequence), reference(old, sequence), reference(new, sequence)
        assert np.array_equal(got[:first], by_old[:first])
        num_different += int((by_old[:first] != by_new[:first]).sum())
        if recompute:
            assert np.array_equal(got[first:], by_new[first:])
    assert num_different > 0, "the two models choose differently"


def test_a_kept_prefix_has_the_routes_of_its_kv(tmp_path: Path) -> None:
    """The routes of a sequence that a push interrupted are its own; others get those of the new weights."""
    paths = [save_model(tmp_path / str(seed), "qwen3_moe", seed=seed) for seed in (0, 1)]
    core, new = make_core(paths[0]), load_model(paths[1])
    prompt = list(range(5, 25))
    interrupted = submit(core, prompt, 10, keeps=True)
    for _ in range(5):
        core.step()
    swap(core, paths[1], recompute=True)
    run(core)
    assert not np.array_equal(routes_of(interrupted), reference(new, interrupted))
    computed = core.contexts.num_prefilled
    for keeps in (True, False):
        after = submit(core, prompt, 6, keeps=keeps)
        run(core)
        assert np.array_equal(routes_of(after), reference(new, after))
    assert core.contexts.num_prefilled == computed + len(prompt) - 1, "the kept prompt was used once"


def test_an_aborted_sequence_has_its_routes(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "qwen3_moe")
    core, model = make_core(path), load_model(path)
    running, preempted = submit(core, [5, 6], 12), submit(core, [9, 4, 7], 12)
    for _ in range(5):
        core.step()
    core.abort([running])
    core.preempt_all()
    core.abort([preempted])
    for sequence in (running, preempted):
        assert len(sequence.output_ids) == 5
        assert np.array_equal(routes_of(sequence), reference(model, sequence))
    waiting = submit(core, [5, 6], 3)
    core.abort([waiting])
    assert waiting.routes_TLK is None and not waiting.output_ids


def test_dense_layers_have_no_routes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, num_experts=300, num_experts_per_tok=4,
        moe_intermediate_size=8, mlp_only_layers=[1], max_position_embeddings=CONTEXT,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    core = make_core(tmp_path)
    recorder = core.model.routes
    assert recorder is not None and recorder.shape == RoutesShape(2, 4, 300)
    sequence = submit(core, [5, 6, 7], 8)
    run(core)
    assert sequence.routes_TLK is not None and sequence.routes_TLK.dtype == np.uint16
    assert sequence.routes_TLK.shape == (10, 2, 4) and sequence.routes_TLK.max() >= 256
    reader = RoutesReader.of_model(config.to_dict())
    assert reader.shape == recorder.shape and reader.layers == (0, 2) and reader.num_reported == 3


def test_without_the_option_nothing_is_recorded(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "qwen3_moe")
    core = make_core(path, records=False)
    assert core.model.routes is None and core.routes is None
    sequence = submit(core, [5, 6, 7], 4)
    run(core)
    assert sequence.routes_TLK is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_without_experts_are_refused(kind: str, tmp_path: Path) -> None:
    path = save_model(tmp_path / kind, kind)
    with pytest.raises(ConfigError, match="no layers with experts"):
        make_core(path)


def test_both_forms_of_a_response_are_read(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "qwen3_moe")
    core = make_core(path)
    sequence = submit(core, [5, 6, 7], 4)
    run(core)
    assert core.model.routes is not None
    reader = RoutesReader.of_embedded(list(core.model.routes.shape))
    assert reader is not None
    output = SequenceOutput(
        sequence=sequence,
        output_ids=sequence.output_ids,
        output_logprobs=sequence.output_logprobs,
        version_spans=sequence.version_spans,
        finish=sequence.finish,
        routes_TLK=sequence.routes_TLK,
    )
    packed, text = (write(output, index=0, version="0") for write in (packed_sequence, sequence_json))
    assert len(base64.b64decode(text["meta_info"]["routed_experts"])) == 4 * 6 * 2 * 2
    for event in (packed, text):
        routes = reader.read(event["meta_info"]["routed_experts"], num_tokens=6)
        assert np.array_equal(routes.experts_TLK, sequence.routes_TLK)


def test_routes_count_towards_the_caches(tmp_path: Path) -> None:
    """A cache with routes takes no more memory than the same one without."""
    path = save_model(tmp_path / "m", "qwen3_moe")
    routed, plain = make_core(path), make_core(path, records=False)
    assert routed.routes is not None
    token_bytes = 1 + routed.routes.num_bytes / routed.kv_bytes  # in tokens of KV
    for cache, other in (
        (routed.contexts.kept, plain.contexts.kept),
        (routed.contexts._prefixes, plain.contexts._prefixes),
    ):
        assert 0 < cache.max_tokens < other.max_tokens
        assert other.max_tokens - token_bytes < token_bytes * cache.max_tokens <= other.max_tokens
