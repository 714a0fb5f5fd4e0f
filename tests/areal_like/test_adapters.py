"""The header of a pushed adapter, its tensors' names, and the digest of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from areal_like.errors import WeightSyncError
from areal_like.weights.adapters import AdapterHeader, adapter_shapes, base_digest, linear_layers
from areal_like.weights.buckets import Bucket, Manifest, TensorSpec

HEADER = AdapterHeader(rank=8, alpha=16, targets=("q_proj", "v_proj"), base="ab" * 32)
LAYERS = {
    f"model.layers.{i}.self_attn.{name}": (size, 32)
    for i in range(2)
    for name, size in (("q_proj", 32), ("v_proj", 16))
}


def test_header_survives_the_wire() -> None:
    bucket = Bucket(tensors=(TensorSpec(name="a", dtype="float32", shape=(2,)),))
    for adapter in (None, HEADER):
        manifest = Manifest(version=3, buckets=(bucket,), adapter=adapter)
        assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    # A push of all weights is what it was before there were adapters.
    assert Manifest(version=3, buckets=(bucket,)).to_dict().keys() == {"version", "buckets"}


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0}, {"rank": 1 << 20}, {"rank": "8"}, {"rank": True}, {"alpha": float("nan")},
        {"alpha": "1"},
        {"targets": []}, {"targets": ["../x"]}, {"targets": "q_proj"}, {"targets": ["a"] * 65},
        {"targets": [7]}, {"base": "short"}, {"base": None}, {"unknown": 1},
    ],
)  # fmt: skip
def test_malformed_header_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(WeightSyncError, match="adapter: "):
        AdapterHeader.from_dict(HEADER.to_dict() | change)
    for raw in (None, [], "header", {}):
        with pytest.raises(WeightSyncError, match="adapter: "):
            AdapterHeader.from_dict(raw)


def test_names_are_those_of_peft_and_targets_must_exist() -> None:
    layers = linear_layers(
        {
            **{f"{name}.weight": shape for name, shape in LAYERS.items()},
            "model.layers.0.self_attn.q_proj.bias": (32,),
            "model.layers.0.input_layernorm.weight": (32,),
            "model.layers.0.mlp.experts.3.q_proj.weight": (8, 32),
            "model.embed_tokens.weight": (100, 32),
            "lm_head.weight": (100, 32),
        }
    )
    assert layers == LAYERS
    shapes = adapter_shapes(HEADER, layers)
    assert list(shapes.items())[:2] == [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (8, 32)),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", (32, 8)),
    ]
    assert len(shapes) == 8
    # As in PEFT, a target is the whole last part of a name, or several last parts.
    narrow = AdapterHeader(rank=8, alpha=16, targets=("1.self_attn.q_proj",), base=HEADER.base)
    assert len(adapter_shapes(narrow, layers)) == 2
    for target in ("proj", "o_proj", "lm_head"):
        other = AdapterHeader(rank=8, alpha=16, targets=("q_proj", target), base=HEADER.base)
        with pytest.raises(WeightSyncError, match=f"no linear layers named {target}"):
            adapter_shapes(other, layers)


def test_digest_tells_bases_apart(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(40, 50), "b": torch.randn(7), "c": torch.ones(3)}

    def digest(name: str, *parts: dict[str, torch.Tensor]) -> str:
        files = [tmp_path / f"{name}-{i}.safetensors" for i in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            save_file(part, file, {"format": "pt"})
        return base_digest(files)

    whole = digest("whole", tensors)
    a, rest = {"a": tensors["a"]}, {"b": tensors["b"], "c": tensors["c"]}
    assert digest("split", rest, a) == whole
    assert digest("half", {**tensors, "a": tensors["a"].half()}) != whole
    assert digest("reshaped", {**tensors, "a": tensors["a"].view(50, 40)}) != whole
    assert digest("renamed", {"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]}) != whole
    assert digest("tuned", {**tensors, "b": tensors["b"] + 1e-3}) != whole
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(WeightSyncError, match="cannot read it as safetensors"):
        base_digest([tmp_path / "text"])
