"""A checkpoint's tensors as parts of a rank's rows of the parameters, against what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.errors import ConfigError
from areal_like.weights.hf_layout import HfTensor, hf_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FUSED = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "phimoe", "ernie4_5_moe", "jamba")
"""Experts are one parameter in the model, one tensor each in the checkpoint."""
SLICED = ("olmo_hybrid",)
"""A parameter's rows are several tensors of the checkpoint."""
RENAMED = ("gpt_neox", "granitemoe")
SAME = ("llama", "qwen3", "gpt2", "gpt_oss")


def config_of(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **SIZES)


def on_meta(model_type: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model_type))


def rows_per_rank(num_rows: int, num_ranks: int) -> list[tuple[int, int]]:
    size = -(-num_rows // num_ranks)
    return [(min(i * size, num_rows), min((i + 1) * size, num_rows)) for i in range(num_ranks)]


def assembled(tensor: HfTensor, param: Tensor, num_ranks: int) -> Tensor:
    """The tensor from the ranks' parts of the parameter."""
    found = torch.full(tensor.shape, float("nan"), dtype=param.dtype)
    for first, end in rows_per_rank(len(param), num_ranks):
        part = tensor.part_in(param[first:end], first_row=first)
        if part is not None:
            view, start = part
            assert view.numel() and view.data_ptr() >= param.data_ptr()
            found[start : start + len(view)] = view
    return found


def test_the_ranks_parts_of_a_tensor_make_up_the_whole() -> None:
    experts_ERC = torch.arange(5 * 4 * 3.0).view(5, 4, 3)
    whole = HfTensor(name="all", shape=(5, 4, 3), param="experts")
    gate = HfTensor(name="3.gate", shape=(2, 3), param="experts", row=3, within=(0, 2))
    up = HfTensor(name="3.up", shape=(2, 3), param="experts", row=3, within=(2, 4))
    last = HfTensor(name="last", shape=(4, 4, 3), param="experts", within=(1, 5))
    cases = (
        (whole, experts_ERC),
        (gate, experts_ERC[3, :2]),
        (up, experts_ERC[3, 2:]),
        (last, experts_ERC[1:]),
    )
    for num_ranks in (1, 2, 3, 8):
        for tensor, expected in cases:
            assert torch.equal(assembled(tensor, experts_ERC, num_ranks), expected)
    for tensor, _ in cases:
        assert tensor.part_in(experts_ERC[5:], first_row=5) is None


@pytest.mark.parametrize("model_type", (*FUSED, *SLICED, *RENAMED, *SAME))
def test_names_shapes_and_bytes_are_those_of_save_pretrained(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    params = {name: param.detach() for name, param in model.named_parameters()}
    tensors = hf_tensors(on_meta(model_type))
    assert {tensor.name: tensor.shape for tensor in tensors} == {
        name: tuple(tensor.shape) for name, tensor in saved.items()
    }
    for tensor in tensors:
        for num_ranks in (1, 3):
            assert torch.equal(assembled(tensor, params[tensor.param], num_ranks), saved[tensor.name])
    assert [each.param for each in tensors] == sorted(
        (each.param for each in tensors), key=list(params).index
    ), "in the order of the parameters"
    assert any(tensor.row is not None for tensor in tensors) == (model_type in FUSED)
    assert any(tensor.within and tensor.row is None for tensor in tensors) == (model_type in SLICED)
    assert (params.keys() == saved.keys()) == (model_type in SAME)
    # A model that was loaded has its own list of conversions, which is neither used nor lost.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    conversions = loaded._weight_conversions
    assert hf_tensors(loaded) == tensors
    assert loaded._weight_conversions is conversions


def test_positions_are_converted_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hf_tensors(on_meta("qwen2_moe"))
    monkeypatch.setattr("areal_like.weights.hf_layout._BATCH_POSITIONS", 100)
    assert hf_tensors(on_meta("qwen2_moe")) == expected


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("hrm_text", "transposes, interleaves or joins")],
)
def test_an_architecture_without_a_map_is_refused(model_type: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_tensors(on_meta(model_type))


@pytest.mark.parametrize("operation", ["transpose", "interleave", "columns"])
def test_conversions_that_are_no_blocks_are_refused(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Concatenate, Interleave, Transpose, WeightConverter

    down = "mlp.down_proj.weight"
    converter = {
        "transpose": WeightConverter(f"{down}_t", down, operations=[Transpose(0, 1)]),
        "interleave": WeightConverter(f"{down}_i", down, operations=[Interleave(dim=0)]),
        "columns": WeightConverter([f"{down}_1", f"{down}_2"], down, operations=[Concatenate(dim=1)]),
    }[operation]
    monkeypatch.setattr("areal_like.weights.hf_layout._conversions", lambda model: [converter])
    with pytest.raises(ConfigError, match=r"transformers makes model\.layers\.0\.mlp\.down_proj"):
        hf_tensors(on_meta("llama"))
