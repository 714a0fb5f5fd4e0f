"""Models with linear attention: no state from one packed sequence in the next, float32 vectors, refusals."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

from areal_like.chat.token_row import TokenRow
from areal_like.config import LoraConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from areal_like.weights.buckets import unflatten
from tests.support.families import HYBRIDS, write_family
from tests.support.quick import others_in_chaos
from tests.support.trainer_helpers import joined, pretend_liger, random_groups
from tests.support.trainer_ranks import make_runner
from tests.trainer.test_families import unpacked
from tests.trainer.test_policy import gradients
from trainer.attention import linear
from trainer.attention.linear import CONVOLUTION, DELTA_RULE, LinearAttention, check_kernels
from trainer.batching.attention_layout import AttentionLayout
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.context import ContextGroup
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.gradients.ghost_tape import GhostTape
from trainer.merge import merge
from trainer.metrics.model_flops import ModelFlops, cost_of
from trainer.models import kernels
from trainer.models.packed_model import decoder_layers
from trainer.models.policy import Policy
from trainer.models.value_model import ValueModel
from trainer.offline.rows import training_sample
from trainer.offline.step import OfflineStep
from trainer.optimizer import ShardedAdamW
from trainer.sft.step import SupervisedLoss
from trainer.weights.snapshot import BackgroundGather

STATE = ("A_log", "norm.weight")
"""Vectors that the mixed checkpoint stores in float32."""
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: write_family(name, tmp_path_factory.mktemp(name)) for name in HYBRIDS}


@pytest.fixture(scope="module")
def mixed(paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second family in bfloat16, but for the vectors of STATE."""
    directory = tmp_path_factory.mktemp("mixed")
    AutoModelForCausalLM.from_pretrained(paths["qwen3_5_text"], dtype=torch.bfloat16).save_pretrained(
        directory
    )
    for file in Path(paths["qwen3_5_text"]).glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    wide = load_file(Path(paths["qwen3_5_text"]) / "model.safetensors")
    tensors |= {name: tensor for name, tensor in wide.items() if is_state(name)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def is_state(name: str) -> bool:
    return ".linear_attn." in name and name.endswith(STATE)


def trajectories() -> list[Trajectory]:
    """Sequences for several rectangles, one longer than a chunk of 64, and a sample of three segments."""
    found = [t for group in random_groups(3, prompt=6) for t in group]
    found += random_groups(1, seed=3, group_size=1, longest=3)[0]
    long = random_groups(1, seed=1, group_size=9, longest=90)[0]
    found.insert(2, max(long, key=lambda t: t.num_tokens))
    found.append(joined(found[:3]))
    return found


def packed(chosen: list[Trajectory], *, context: ContextGroup | None = None) -> PackedBatch:
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in chosen]
    return collate(samples, shares_prefixes=False, context=context)


def dtypes_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    others_in_chaos(
        itertools.product(HYBRIDS, (False, True)), quick=[("qwen3_next", True), ("qwen3_5_text", False)]
    ),
)
def test_packed_equals_unpacked(
    paths: dict[str, str], family: str, checkpointing: bool, ranks: Ranks
) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(paths[family], dtype=torch.float32).eval()
    want_S = unpacked(reference, trajectories())
    policy = Policy.load(paths[family], ranks, chunk_tokens=16, gradient_checkpointing=checkpointing)
    batch = packed(trajectories())
    assert len(batch.attention_layout.rectangles.rectangles) > 1
    got_S = policy(batch).logprobs_S
    torch.testing.assert_close(got_S, want_S, rtol=0, atol=1e-5)
    weights_S = torch.linspace(-1, 1, len(got_S))
    (want_S * weights_S).sum().backward()
    (got_S * weights_S).sum().backward()
    want = gradients(reference)
    assert want.keys() == gradients(policy.model).keys()
    for name, grad in gradients(policy.model).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-4, msg=name)


def leak(policy: Policy) -> float:
    """Largest change of log-probs of a sequence when the one before it changes."""
    first, second = random_groups(1, seed=5, group_size=2, longest=20)[0]
    after = []
    for shift in (0, 1):
        changed = Trajectory(**vars(first) | {"tokens": (first.tokens - 3 + shift) % 30 + 3})
        with torch.no_grad():
            after.append(policy(packed([changed, second])).logprobs_S[-second.num_sampled :])
    return float((after[0] - after[1]).abs().max())


@pytest.mark.parametrize("family", HYBRIDS)
def test_no_state_reaches_the_next_sequence(
    paths: dict[str, str], family: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(paths[family], ranks)
    # The product of an expert has rows of both sequences, and their number may change its rounding.
    assert leak(policy) <= (1e-6 if family == "qwen3_next" else 0.0)

    def as_one_sequence(forward: Callable[[Tensor], Tensor], hidden_UD: Tensor, _: object) -> Tensor:
        return forward(hidden_UD[None])[0]

    monkeypatch.setattr(linear, "in_rectangles", as_one_sequence)
    assert leak(policy) > 1e-4, "the test sees a state that is handed on"


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, head_first: bool = False,
) -> Any:  # fmt: skip
    """The signature of flash-linear-attention, computed by transformers for each sequence."""
    assert cu_seqlens is not None and cu_seqlens.dtype == torch.int64 and initial_state is None
    outs = [
        modeling_qwen3_5.torch_chunk_gated_delta_rule.__wrapped__(
            *(x[:, a:b] for x in (q, k, v)),
            g=g[:, a:b],
            beta=beta[:, a:b],
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )[0]
        for a, b in itertools.pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(outs, 1), None


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """The signature of causal-conv1d, computed by the definition."""
    assert seq_idx is not None and seq_idx.dtype == torch.int32 and activation == "silu" and bias is None
    length, width = x.shape[-1], weight.shape[1]
    total = torch.zeros_like(x)
    for back in range(min(width, length)):
        is_same = seq_idx[:, None, back:] == seq_idx[:, None, : length - back]
        tap = weight[None, :, width - 1 - back, None]
        total[:, :, back:] += x[:, :, : length - back] * tap * is_same
    return torch.nn.functional.silu(total)


def module_of(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


@pytest.mark.parametrize("family", HYBRIDS)
def test_kernels_get_the_bounds_of_the_sequences(
    paths: dict[str, str], family: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through transformers, which chooses by what it can import and filters by names of arguments."""
    policy = Policy.load(paths[family], ranks)
    batch = packed(trajectories())
    want_S = policy(batch).logprobs_S
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    rule = module_of("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, rule.__name__, rule)
    convolution = module_of("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, convolution.__name__, convolution)
    module = sys.modules[type(policy.linear_layers[0].layer).__module__]
    for function, kernel, package in (
        (DELTA_RULE, "chunk_gated_delta_rule", "fla"),
        (CONVOLUTION, "causal_conv1d_fn", "causal_conv1d"),
    ):
        choose = use_kernel_func_from_hub_with_fallback(kernel, package)
        monkeypatch.setattr(module, function, choose(getattr(module, function).__wrapped__))
    monkeypatch.setattr(linear, "uses_kernels", lambda kind, hidden: True)
    got_S = policy(batch).logprobs_S
    torch.testing.assert_close(got_S, want_S, rtol=0, atol=1e-5)
    assert not torch.equal(got_S, want_S), "another order of summation: it was computed by these functions"
    got_S.sum().backward()
    want = gradients(policy)
    assert all(bool(grad.isfinite().all()) for grad in want.values())
    policy.zero_grad()
    ranks.context = ContextGroup(1)
    of_context_S = policy(packed(trajectories(), context=ranks.context)).logprobs_S
    torch.testing.assert_close(of_context_S, got_S, rtol=0, atol=1e-6)
    of_context_S.sum().backward()
    for name, grad in gradients(policy).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_cpu_never_calls_kernels(
    paths: dict[str, str], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would call them for any tensor once they can be imported."""
    want_S = Policy.load(paths["qwen3_5_text"], ranks)(packed(trajectories())).logprobs_S
    layer = type(Policy.build(paths["qwen3_5_text"]).linear_layers[0].layer)
    module = sys.modules[layer.__module__]
    for name in (CONVOLUTION, DELTA_RULE):

        @functools.wraps(getattr(module, name).__wrapped__)
        def kernel(*_: Any, **__: Any) -> None:
            raise AssertionError("a kernel of a GPU was called")

        monkeypatch.setattr(module, name, kernel)
    monkeypatch.setattr(linear, "_FORWARDS_IN_TORCH", {})
    got_S = Policy.load(paths["qwen3_5_text"], ranks)(packed(trajectories())).logprobs_S
    assert torch.equal(got_S, want_S)


def test_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    absent = {"flash-linear-attention", "causal-conv1d"}
    monkeypatch.setattr(linear, "_import_error", lambda name: f"{name} is absent" * (name in absent))
    linear._log_once.cache_clear()
    caplog.set_level("INFO")
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    with pytest.raises(ConfigError, match="pip install flash-linear-attention causal-conv1d"):
        check_kernels(CUDA, kind="auto", **settings)
    check_kernels(CUDA, kind="rectangles", **settings)
    check_kernels(CUDA, kind="auto", dtype=torch.float32)
    absent.remove("flash-linear-attention")
    check_kernels(CUDA, kind="auto", **settings)
    with pytest.raises(ConfigError, match="varlen: causal-conv1d is absent"):
        check_kernels(CUDA, kind="varlen", **settings)
    absent.clear()
    for _ in range(2):
        check_kernels(CUDA, kind="auto", **settings)
    check_kernels(CPU, kind="auto", dtype=torch.float32)
    with pytest.raises(ConfigError, match="need CUDA"):
        check_kernels(CPU, kind="varlen", **settings)
    ways = [record.message.removeprefix("linear attention: ") for record in caplog.records]
    assert ways == [
        "rectangles (trainer.attention=rectangles); prefixes are not shared",
        "rectangles (the kernels of linear attention do not support float32); prefixes are not shared",
        "rectangles (causal-conv1d is absent); prefixes are not shared",
        "kernels; prefixes are not shared",
        "rectangles (the kernels of linear attention need CUDA, and the trainer runs on cpu); prefixes are "
        "not shared",
    ]


@pytest.mark.parametrize("balances", [False, True])
def test_steps_share_no_prefixes(paths: dict[str, str], ranks: Ranks, balances: bool) -> None:
    """In no pass: policy, critic, reference in rewards."""
    settings = {
        "advantage": {"name": "gae"},
        "kl": {"coef": 0.1, "place": "reward"},
        "objective": {"name": "tis", "level": "token"},
    }
    groups = random_groups(3, prompt=8)
    runner = make_runner(
        paths["qwen3_5_text"],
        ranks,
        dtype=torch.float32,
        settings=settings,
        balances=balances,
        budget_tokens=60,
    )
    assert runner.run(groups, step=5)["shared_share"] == 0.0
    with pytest.raises(AssertionError):
        samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in groups[0]]
        runner.policy(collate(samples))


def test_supervised_steps_share_no_prefixes(paths: dict[str, str], ranks: Ranks) -> None:
    policy = Policy.load(paths["qwen3_next"], ranks)
    optimizer = ShardedAdamW(policy, ranks, lr=1e-2)
    step = OfflineStep(SupervisedLoss(policy), optimizer, ranks, budget_tokens=60)
    rows = [
        [training_sample(TokenRow(tokens=t.tokens.tolist(), loss_mask=t.loss_mask.tolist()))]
        for group in random_groups(3, prompt=8)
        for t in group
    ]
    found = [step.train(rows, step=number) for number in range(3)]
    assert {each["shared_share"] for each in found} == {0.0} and found[0]["num_microbatches"] > 1
    assert found[2]["loss"] < found[0]["loss"]
    assert step.measure(rows)[0]["loss"] < found[2]["loss"]


def test_float32_vectors_stay_float32(mixed: Path, tmp_path: Path, ranks: Ranks) -> None:
    """In the forward, in pushes, in checkpoints and in a merged model, beside weights in bfloat16."""
    files = load_file(mixed / "model.safetensors")
    policy = Policy.load(str(mixed), ranks, dtype="bfloat16", gradient_checkpointing=True)
    assert policy.float32_names == {name for name in files if is_state(name)} != set()
    seen: list[tuple[torch.dtype, bool]] = []
    for layer in decoder_layers(policy.model):
        if not hasattr(layer, "linear_attn"):
            continue
        name = f"model.layers.{layer.linear_attn.layer_idx}.linear_attn.A_log"

        def look(module: Any, _: Any, layer: Any = layer, name: str = name) -> None:
            value = layer.linear_attn._parameters["A_log"]
            seen.append((module.weight.dtype, torch.equal(value, files[name])))

        layer.linear_attn.out_proj.register_forward_pre_hook(look)
    got_S = policy(packed(trajectories())).logprobs_S
    got_S.sum().backward()
    assert len(seen) > 4 and set(seen) == {(torch.bfloat16, True)}, "also when it is recomputed"
    with torch.no_grad():
        want_S = Policy.load(str(mixed), ranks)(packed(trajectories())).logprobs_S
    assert 0 < float((got_S.detach() - want_S).abs().max()) < 0.1
    for name, param in policy.model.named_parameters():
        if name in policy.float32_names:
            grad = local(param.grad)
            assert param.dtype == grad.dtype == torch.float32 and grad.abs().max() > 0, name
            local(param.detach()).add_(1e-4)  # less than half a step of bfloat16's numbers
    snapshotter = BackgroundGather(policy, ranks, bucket_bytes=5000, dtype="bfloat16")
    snapshot = snapshotter.take_snapshot()
    assert snapshot is not None and snapshot.acquire()
    sent: dict[str, Tensor] = {}
    for index, bucket in enumerate(snapshot.buckets):
        sent |= unflatten(bucket, snapshot.read(index).data)
    assert {name for name, tensor in sent.items() if tensor.dtype == torch.float32} == policy.float32_names
    for name, tensor in files.items():
        assert torch.equal(sent[name], tensor + 1e-4 if is_state(name) else tensor), name
    snapshotter.close()


def test_a_resume_needs_the_files_of_the_dtypes(mixed: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Without them the vectors that are float32 would be rounded, silently."""
    path = shutil.copytree(mixed, tmp_path / "model")
    (path / "model.safetensors").unlink()
    for dtype in ("bfloat16", "float32"):
        policy = Policy.build(str(path)).shard(ranks, dtype=dtype)
        refused = pytest.raises(ConfigError, match=r"no model\.safetensors")
        with refused if dtype == "bfloat16" else contextlib.nullcontext():
            policy.read_untrained()


def test_files_keep_the_dtypes(mixed: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Of a checkpoint, several files of it, and a model that an adapter was merged into."""
    want = dtypes_of(mixed / "model.safetensors")
    runner = make_runner(str(mixed), ranks, dtype=torch.float32)
    for limit in (1 << 30, 20_000):
        root = tmp_path / f"{limit}"
        checkpoints = Checkpoints(
            root, keep=1, tokenizer_path=str(mixed), dtype="bfloat16", max_file_bytes=limit
        )
        checkpoints.save(1, ranks=ranks, extra={}, **runner.saved)
        checkpoints.wait()
        files = sorted(checkpoints.path(1).glob("model*.safetensors"))
        assert (len(files) > 1) == (limit == 20_000)
        assert {name: dtype for file in files for name, dtype in dtypes_of(file).items()} == want
        loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
        initial = load_file(mixed / "model.safetensors")
        assert not [name for name in loaded if not torch.equal(loaded[name], initial[name])]
        if (index := checkpoints.path(1) / "model.safetensors.index.json").exists():
            size = sum(tensor.nbytes for tensor in loaded.values())
            assert json.loads(index.read_text())["metadata"]["total_size"] == size
        other = make_runner(str(mixed), ranks, dtype=torch.float32, has_weights=False)
        checkpoints.load(1, ranks=ranks, **other.saved)
        checkpoints.close()
        for ours, theirs in zip(runner.policy.parameters(), other.policy.parameters(), strict=True):
            assert torch.equal(local(ours), local(theirs))
    lora = make_runner(str(mixed), ranks, dtype=torch.float32, lora=LoraConfig(rank=2))
    lora.run(random_groups(3), step=0)
    checkpoints = Checkpoints(tmp_path / "lora", keep=1, tokenizer_path=str(mixed))
    checkpoints.save(1, ranks=ranks, extra={}, **lora.saved)
    checkpoints.close()
    merge(str(checkpoints.path(1)), tmp_path / "merged", base=str(mixed))
    assert dtypes_of(tmp_path / "merged" / "model.safetensors") == want


@pytest.mark.parametrize("family", HYBRIDS)
def test_adapters_on_linear_attention(paths: dict[str, str], family: str, ranks: Ranks) -> None:
    """All linear layers get one, those of linear attention too; the convolution and the state are frozen."""
    runner = make_runner(paths[family], ranks, dtype=torch.float32, lora=LoraConfig(rank=2))
    names = [name for name, param in runner.policy.named_parameters() if param.requires_grad]
    projections = {name.split(".linear_attn.")[1].split(".")[0] for name in names if ".linear_attn." in name}
    assert {"out_proj"} < projections and all(name.startswith(("in_", "out_")) for name in projections)
    metrics = [runner.run(random_groups(4, seed=step), step=step) for step in range(2)]
    assert all(each["grad_norm"] > 0 for each in metrics)
    assert not any("expert" in name for name in names)
    refused = {"conv1d": "cannot have an adapter"}
    if family == "qwen3_next":
        refused |= dict.fromkeys(("gate_proj", "shared_expert_gate"), "with routed experts of")
    for target, why in refused.items():
        with pytest.raises(ConfigError, match=rf"model\.lora\.targets: {target}.* {why}"):
            Policy.build(paths[family], lora_settings=LoraConfig(rank=2, targets=(target,)))


def test_ghost_norms_are_refused(paths: dict[str, str]) -> None:
    """Also with adapters: their layers run on padded rows."""
    for settings, part in ((None, "dt_bias"), (LoraConfig(rank=2), "in_proj_qkv")):
        policy = Policy.build(paths["qwen3_5_text"], lora_settings=settings)
        with pytest.raises(ConfigError, match=rf"ghost does not support .*linear_attn\.{part}"):
            GhostTape(policy)
    of_attention = LoraConfig(rank=2, targets=("q_proj", "gate_proj"))
    GhostTape(Policy.build(paths["qwen3_5_text"], lora_settings=of_attention))


def test_exact_norms_of_single_sequences(paths: dict[str, str], ranks: Ranks) -> None:
    settings = {"objective": {"name": "vcpo", "norms": "exact"}}
    runner = make_runner(paths["qwen3_5_text"], ranks, dtype=torch.float32, settings=settings)
    metrics = runner.run(random_groups(4, prompt=6), step=5)
    assert metrics["grad_norm"] > 0 and metrics["shared_share"] == 0.0


@pytest.mark.chaos
def test_compilation_and_liger_leave_it_out(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for family in HYBRIDS:
        policy = Policy.build(paths[family], compiles=True)
        for layer in decoder_layers(policy.model):
            plain = {name for name, child in layer.named_children() if child._compiled_call_impl is None}
            attention = "linear_attn" if hasattr(layer, "linear_attn") else "self_attn"
            assert plain == {attention} | ({"mlp"} if family == "qwen3_next" else set())
    pretend_liger(monkeypatch, None, family="qwen3_5_text")
    caplog.set_level("INFO")
    assert not kernels.apply_liger(Policy.build(paths["qwen3_5_text"]).model)
    assert "Liger has none for models of type qwen3_5_text" in caplog.text


def test_flops_of_linear_attention(paths: dict[str, str]) -> None:
    """Three products with the state of each layer, for each row; attention only in the layer that has it."""
    policy = Policy.build(paths["qwen3_5_text"])
    flops = ModelFlops.of(policy.model)
    config = policy.model.config
    state = 2 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    assert (flops.state_values, flops.num_layers_of) == (state, {0: 1})
    pairs = 5 * 6 / 2 + 3 * 4 / 2
    want = 2 * 8 * (flops.body_weights + 3 * state) + 4 * flops.heads_size * pairs
    assert flops.of_forward([5, 3], num_targets=0) == want
    assert flops.of_step([5, 3], num_targets=0) == 3 * want
    assert cost_of(flops).per_row == 6 * (flops.body_weights + flops.head_weights + 3 * state)


def test_other_layers_with_a_state_are_refused(tmp_path: Path) -> None:
    """Of a class whose forward was not looked at."""
    from tests.areal_like.test_hf_layout import config_of

    AutoModelForCausalLM.from_config(config_of("olmo_hybrid")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has linear_attention layers"):
        Policy.build(str(tmp_path))


def test_a_value_model_keeps_sequences_apart(paths: dict[str, str], ranks: Ranks) -> None:
    chosen = trajectories()[:3]
    model = ValueModel.load(paths["qwen3_next"], ranks)
    with torch.no_grad():
        for param in model.parameters():
            local(param).add_(0.01)
        together_S = model(packed(chosen))
        alone_S = torch.cat([model(packed([each])) for each in chosen])
    torch.testing.assert_close(together_S, alone_S, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "triton", "others", "is_refused"),
    [
        ((9, 0), "3.6.0", set(), True),
        ((9, 0), "3.6.0", {"tilelang"}, False),
        ((9, 0), "3.7.1", set(), False),
        ((10, 0), "3.6.0", set(), False),
    ],
)
def test_a_wrong_triton_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: str,
    others: set[str],
    is_refused: bool,
) -> None:
    """On Hopper GPUs, where flash-linear-attention itself raises in the first backward."""
    assert linear._wrong_on_hopper() == "" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    package = ModuleType("triton")
    package.__version__ = triton  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", package)
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: name if name in others else None)
    assert (f"Triton {triton} computes wrong gradients" in linear._wrong_on_hopper()) == is_refused


@pytest.mark.gpu
@pytest.mark.skipif(
    bool(linear._import_error("flash-linear-attention")), reason="needs flash-linear-attention"
)
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_a_layer_on_a_gpu(model_type: str) -> None:
    """In bfloat16, with kernels (if causal-conv1d is there) and in rectangles, against float32 on the CPU."""
    config = AutoConfig.for_model(
        model_type, vocab_size=8, hidden_size=256, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].linear_attn
    hidden_1UD = torch.randn(1, 400, 256, requires_grad=True)
    weights_1UD = torch.randn(1, 400, 256)

    def run(layer: torch.nn.Module, device: torch.device, kind: Any) -> tuple[Tensor, Tensor]:
        layout = AttentionLayout(lengths=(3, 150, 64, 183), device=device, shared=None, row_T=None)
        dtype = next(layer.parameters()).dtype
        inputs = hidden_1UD.detach().to(device, dtype).requires_grad_()
        out = LinearAttention(layer)(inputs, packed_layout=layout, packed_kind=kind)
        (out * weights_1UD.to(out)).sum().backward()
        assert inputs.grad is not None
        return out.detach().float().cpu(), inputs.grad.float().cpu()

    want = run(exact, CPU, "auto")
    for kind in ("auto", "rectangles"):
        got = run(copy.deepcopy(exact).to(CUDA, torch.bfloat16), CUDA, kind)
        for one, other in zip(got, want, strict=True):
            assert float((one - other).norm() / other.norm()) < 0.03, kind
