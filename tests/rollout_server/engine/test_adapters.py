"""LoRA adapters in the engine's core: log-probs against peft, versions side by side, their bound."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from areal_like.errors import WeightSyncError
from areal_like.trajectory import FinishReason
from rollout_server.engine.core import EngineCore, Running
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from tests.support.adapters import PeftAdapter, make_adapter
from tests.support.engine_harness import TOLERANCE, load_model, reference_logprobs, save_model

PROMPT = (5, 6, 7, 8, 9)


def make_core(path: Path, *, fast: bool = True, max_adapters: int = 3) -> EngineCore:
    model, weights = load(
        str(path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context_length=64,
        allow_fast_path=fast,
    )
    options = EngineOptions(
        max_running_requests=6, context_length=64, prefix_cache_tokens=1000, max_adapters=max_adapters
    )
    return EngineCore(model, weights, options, version="0")


def submit(
    core: EngineCore, num_tokens: int, *, prompt: tuple[int, ...] = PROMPT, keeps_prefix: bool = False
) -> Sequence:
    sequence = Sequence(
        seq_id=f"{core.num_generated}-{len(core.scheduler.by_id)}",
        prompt=prompt,
        params=SamplingParams(max_new_tokens=num_tokens),
        keeps_prefix=keeps_prefix,
    )
    core.submit(sequence)
    return sequence


def activate(
    core: EngineCore, adapter: PeftAdapter, *, version: str, running: Running = "recompute"
) -> list[Sequence]:
    tensors = core.new_adapter(adapter.header)
    assert tensors.keys() == adapter.tensors.keys()
    for name, tensor in tensors.items():
        tensor.copy_(adapter.tensors[name])
    return core.activate_adapter(tensors, version=version, running=running)


def run(core: EngineCore, *, steps: int = 1000) -> None:
    while core.all_sequences and steps:
        core.step()
        core.scheduler.check()
        steps -= 1


def errors(model: object, sequence: Sequence) -> np.ndarray:
    """|difference| of each token's log-prob to the reference's."""
    want = reference_logprobs(model, sequence.prompt, sequence.output_ids)
    return np.abs(want - np.array(sequence.output_logprobs))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", None),
        ("qwen2", ("q_proj", "v_proj")),
        ("qwen3", ("o_proj", "up_proj")),
        ("qwen3_moe", ("q_proj", "o_proj")),
    ],
)
def test_log_probs_are_those_of_peft(
    kind: str, targets: tuple[str, ...] | None, fast: bool, tmp_path: Path
) -> None:
    path = save_model(tmp_path / kind, kind)
    adapter = make_adapter(path, seed=1, **({} if targets is None else {"targets": targets}))
    core = make_core(path, fast=fast)
    activate(core, adapter, version="1")
    sequences = [submit(core, 9), submit(core, 6), submit(core, 7, prompt=(11,))]
    run(core)
    for sequence in sequences:
        assert errors(adapter.model, sequence).max() < TOLERANCE
        assert errors(load_model(path), sequence).max() > 100 * TOLERANCE  # the adapter matters
        assert sequence.version_spans == [("1", 0, len(sequence.output_ids))]
    scored = core.score([*PROMPT, *sequences[0].output_ids], first=len(PROMPT))
    assert np.abs(scored - sequences[0].output_logprobs).max() < TOLERANCE


@pytest.mark.parametrize("fast", [True, False])
def test_versions_finish_side_by_side(fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, two adapters and a preempted sequence: each under the version that it began with, also where
    they have the same prompt. KV of a prompt never passes from one version to another."""
    path = save_model(tmp_path / "llama", "llama")
    one, two = make_adapter(path, seed=1), make_adapter(path, seed=2)
    core = make_core(path, fast=fast)
    alone, compute = [], core.model.compute
    monkeypatch.setattr(core.model, "compute", lambda *args: (alone.append(args), compute(*args)))
    base = submit(core, 12)
    run(core, steps=2)
    assert len(alone) == (0 if fast else 1)
    activate(core, one, version="1", running="finish")
    first = [submit(core, 12), submit(core, 12, keeps_prefix=True)]
    run(core, steps=2)
    assert len(alone) == (1 if fast else 2), "a pass of rows of two versions has no prefill"
    activate(core, two, version="2", running="finish")
    second = [submit(core, 12), submit(core, 12, keeps_prefix=True)]
    run(core, steps=2)
    core.preempt_all()
    run(core)
    continued = submit(core, 5, prompt=(*second[1].prompt, *second[1].output_ids), keeps_prefix=True)
    late = submit(core, 5, prompt=(*first[1].prompt, *first[1].output_ids), keeps_prefix=True)
    run(core)
    cases = [(base, load_model(path), "0")]
    cases += [(sequence, one.model, "1") for sequence in first]
    cases += [(sequence, two.model, "2") for sequence in (*second, continued, late)]
    for sequence, model, version in cases:
        assert sequence.version_spans == [(version, 0, len(sequence.output_ids))]
        assert errors(model, sequence).max() < TOLERANCE
    assert continued.num_cached_tokens == len(continued.prompt) - 1  # kept under the newest version
    assert late.num_cached_tokens <= len(PROMPT)  # what ended under version 1 was not kept


@pytest.mark.parametrize("running", ["recompute", "keep"])
def test_running_sequences_change_at_the_push(running: Running, tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    adapters = [make_adapter(path, seed=seed) for seed in (1, 2, 3, 4)]
    core = make_core(path, max_adapters=1)
    sequence = submit(core, 20)
    for number, adapter in enumerate(adapters, 1):
        run(core, steps=4)
        assert activate(core, adapter, version=str(number), running=running) == []
    run(core)
    assert sequence.version_spans == [(str(i), 4 * i, 4 * i + 4) for i in range(5)]
    models = [load_model(path), *(adapter.model for adapter in adapters)]
    for number, model in enumerate(models):
        found = errors(model, sequence)[4 * number : 4 * number + 4].max()
        # With `keep`, attention reads KV of earlier versions.
        assert found < TOLERANCE if running == "recompute" or number == 0 else found > TOLERANCE


def test_oldest_version_is_aborted_if_all_slots_are_in_use(tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    adapters = [make_adapter(path, seed=seed) for seed in (1, 2, 3)]
    core = make_core(path, max_adapters=2)
    sequences = []
    for number, adapter in enumerate(adapters[:2], 1):
        assert activate(core, adapter, version=str(number), running="finish") == []
        sequences += [submit(core, 30), submit(core, 30)]
        run(core, steps=3)
    assert activate(core, adapters[2], version="3", running="finish") == sequences[:2]
    for sequence in sequences[:2]:
        assert sequence.finish is not None and sequence.finish.reason is FinishReason.ABORT
        assert "all 2 slots are in use" in sequence.finish.message
        assert sequence.version_spans == [("1", 0, 6)]
    newest = submit(core, 8)
    run(core)
    assert [span[0] for span in sequences[2].version_spans] == ["2"]
    assert errors(adapters[1].model, sequences[2]).max() < TOLERANCE
    assert errors(adapters[2].model, newest).max() < TOLERANCE
    # Nothing uses versions 1 and 2 any more: both slots can be taken without an abort.
    for number, adapter in enumerate(adapters[:2], 4):
        assert activate(core, adapter, version=str(number), running="finish") == []
        submit(core, 30)
        run(core, steps=1)


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "llama", "llama")
    adapter, wider = make_adapter(path, seed=1), make_adapter(path, seed=2, rank=8)
    with pytest.raises(WeightSyncError, match="takes no adapters"):
        make_core(path, max_adapters=0).new_adapter(adapter.header)
    core = make_core(path)
    activate(core, adapter, version="1")
    with pytest.raises(WeightSyncError, match=r"rank=8.*rank=4"):
        core.new_adapter(wider.header)
    unknown = make_core(save_model(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(WeightSyncError, match="no linear layers named"):
        unknown.new_adapter(adapter.header)
    assert set(get_args(Running)) == {"recompute", "keep", "finish"}
