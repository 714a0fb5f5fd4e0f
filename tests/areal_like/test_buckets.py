"""Buckets: cutting, flattening, checksums, and the refusal of tensors that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import (
    Bucket,
    Manifest,
    TensorSpec,
    check_names,
    checksum,
    checksum_and_finiteness,
    cut_buckets,
    flatten,
    is_finite,
    spec_of,
    unflatten,
)

specs = st.lists(
    st.tuples(
        st.sampled_from(["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
).map(lambda items: [TensorSpec(name=f"t{i}", dtype=d, shape=s) for i, (d, s) in enumerate(items)])


@given(specs=specs, bucket_bytes=st.integers(1, 400))
@settings(max_examples=100)
def test_every_tensor_is_sent_once_and_unchanged(specs: list[TensorSpec], bucket_bytes: int) -> None:
    sent = {s.name: torch.randn(s.shape).to(getattr(torch, s.dtype)) for s in specs}
    buckets = cut_buckets(specs, bucket_bytes=bucket_bytes)
    assert sorted(s.name for b in buckets for s in b.tensors) == sorted(sent)
    for bucket in buckets:
        assert bucket.num_bytes <= bucket_bytes or len([s for s in bucket.tensors if s.num_bytes]) == 1
        flat = flatten(bucket, sent)
        for name, tensor in unflatten(bucket, flat).items():
            assert tensor.dtype == sent[name].dtype
            assert (
                torch.equal(tensor.view(torch.uint8), sent[name].view(torch.uint8)) if tensor.ndim else True
            )


def test_layout_is_concatenation_by_decreasing_item_size() -> None:
    tensors = {
        "b": torch.arange(3, dtype=torch.bfloat16),
        "a": torch.randn(2, 2),
        "c": torch.ones(5, dtype=torch.float16),
    }
    (bucket,) = cut_buckets([spec_of(n, t) for n, t in tensors.items()], bucket_bytes=1 << 20)
    assert [s.name for s in bucket.tensors] == ["a", "b", "c"], (
        "want decreasing item size, and the given order within one size"
    )
    want = torch.cat([tensors[s.name].flatten().view(torch.uint8) for s in bucket.tensors])
    assert torch.equal(flatten(bucket, tensors), want)


def test_flatten_casts_and_refuses_other_shapes() -> None:
    master = {"w": torch.randn(4, 3)}
    (bucket,) = cut_buckets([spec_of("w", master["w"], dtype="bfloat16")], bucket_bytes=1 << 20)
    assert torch.equal(unflatten(bucket, flatten(bucket, master))["w"], master["w"].bfloat16())
    with pytest.raises(WeightSyncError, match="not among the weights"):
        flatten(bucket, {})
    with pytest.raises(WeightSyncError, match=r"shape \[3, 4\], but \[4, 3\] in the manifest"):
        flatten(bucket, {"w": master["w"].T})
    with pytest.raises(WeightSyncError, match=r"want uint8\[24\]"):
        unflatten(bucket, torch.empty(23, dtype=torch.uint8))


def test_unflatten_refuses_an_unaligned_bucket() -> None:
    specs = (
        TensorSpec(name="a", dtype="float16", shape=(1,)),
        TensorSpec(name="b", dtype="float32", shape=(1,)),
    )
    with pytest.raises(WeightSyncError, match="decreasing item size"):
        unflatten(Bucket(tensors=specs), torch.empty(6, dtype=torch.uint8))


@pytest.mark.parametrize("num_bytes", [1000, 256 << 10, (600 << 10) + 5])
def test_checksum_detects_a_flipped_bit_and_a_shift(num_bytes: int) -> None:
    flat = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = checksum(flat)
    assert checksum(flat.clone()) == before
    for index in (0, num_bytes // 2, num_bytes - 1):
        for bit in (1, 128):
            flat[index] ^= bit
            assert checksum(flat) != before
            flat[index] ^= bit
    for shift in (1, 8, 256 << 10):
        assert num_bytes <= shift or checksum(flat.roll(shift)) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_bytes", [0, 64, 256 << 10, (600 << 10) + 16])
def test_single_non_finite_value_is_detected_anywhere(dtype: torch.dtype, num_bytes: int) -> None:
    values = torch.randn(num_bytes // dtype.itemsize, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = values.view(torch.uint8)
    assert checksum_and_finiteness(flat, dtype=dtype) == (checksum(flat), True)
    for index in {0, len(values) // 2, len(values) - 1} if num_bytes else ():
        for bad in (float("nan"), float("inf"), float("-inf")):
            before = values[index].clone()
            values[index] = bad
            assert checksum_and_finiteness(flat, dtype=dtype) == (checksum(flat), False) and not is_finite(
                values
            )
            values[index] = before
    if num_bytes > 64:
        values[0], values[1] = float("inf"), float("-inf")
        assert not is_finite(values) and not checksum_and_finiteness(flat, dtype=dtype)[1]
    values.fill_(torch.finfo(dtype).max)  # finite, and their sum is not
    assert is_finite(values) and checksum_and_finiteness(flat, dtype=dtype)[1]


def test_manifest_survives_json() -> None:
    specs = [TensorSpec(name=f"t{i}", dtype="float32", shape=(i, 2)) for i in range(5)]
    for untrained in ((), ("model.visual.patch.weight", "bias")):
        manifest = Manifest(version=7, buckets=cut_buckets(specs, bucket_bytes=40), untrained=untrained)
        plain = manifest.to_dict()
        assert ("untrained" in plain) == bool(untrained), "servers of earlier releases know no such key"
        assert Manifest.from_dict(json.loads(json.dumps(plain))) == manifest
        for wrong in ("names", [1], {}):
            with pytest.raises(WeightSyncError, match="list of names"):
                Manifest.from_dict(plain | {"untrained": wrong})
    assert manifest.num_bytes == sum(s.num_bytes for s in specs)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"names": ["a"], "dtypes": ["float32"]}, "must be lists"),
        ({"names": ["a"], "dtypes": ["float32"], "shapes": []}, "one entry per tensor"),
        ({"names": ["a"], "dtypes": ["float32"], "shapes": [3]}, "one entry per tensor"),
        ({"names": [], "dtypes": [], "shapes": []}, "at least one tensor"),
        ({"names": ["a"], "dtypes": ["object"], "shapes": [[1]]}, "dtype 'object'"),
        ({"names": ["a"], "dtypes": ["float32"], "shapes": [[-1]]}, "not a list of sizes"),
        ({"names": ["a"], "dtypes": ["float32"], "shapes": [[True]]}, "not a list of sizes"),
        ({"names": [""], "dtypes": ["float32"], "shapes": [[1]]}, "non-empty string"),
        ({"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "checksum": "x"}, "checksum"),
    ],
)
def test_malformed_bucket_is_refused_with_the_reason(raw: dict[str, object], message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        Bucket.from_dict(raw)


def test_check_names_reports_the_differences() -> None:
    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    shapes = {"embed": (5, 2), "norm": (2,)}
    check_names([spec("embed", 5, 2), spec("norm", 2)], shapes, tied=["head"])
    check_names([spec("embed", 5, 2), spec("norm", 2), spec("head", 5, 2)], shapes, tied=["head"])
    for sent, message in [
        ([spec("embed", 5, 2)], "missing: norm"),
        ([spec("embed", 5, 2), spec("norm", 2), spec("x", 1)], "unknown to the model: x"),
        ([spec("embed", 5, 3), spec("norm", 2)], r"embed: want \[5, 2\], got \[5, 3\]"),
        ([spec("embed", 5, 2), spec("norm", 2), spec("norm", 2)], "sent twice: norm"),
    ]:
        with pytest.raises(WeightSyncError, match=message):
            check_names(sent, shapes)


class _Counted(str):
    """A name that counts how often it is looked up."""

    num_lookups = 0

    def __hash__(self) -> int:
        _Counted.num_lookups += 1
        return super().__hash__()


def test_names_are_compared_in_linear_time() -> None:
    """A mixture of experts has 40,000 tensors, and each push is compared."""
    specs = [TensorSpec(name=_Counted(f"experts.{i}"), dtype="float32", shape=(1,)) for i in range(500)]
    shapes = {spec.name: spec.shape for spec in specs}
    _Counted.num_lookups = 0
    check_names(specs, shapes)
    assert 0 < _Counted.num_lookups <= 10 * len(specs)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    manifest=st.fixed_dictionaries({"version": _plain, "buckets": _plain})
    | st.builds(
        lambda columns: {"version": 1, "buckets": [columns]},
        st.fixed_dictionaries({"names": _plain, "dtypes": _plain, "shapes": _plain, "checksum": _plain})
        | st.builds(
            lambda name, dtype, shape: {
                "names": [name],
                "dtypes": [dtype],
                "shapes": [shape],
                "checksum": None,
            },
            st.text(max_size=3) | _plain,
            st.sampled_from(["float32", "bfloat16"]) | _plain,
            st.lists(st.integers(0, 4), max_size=3) | _plain,
        ),
    )
)
@settings(max_examples=200)
def test_malformed_manifests_raise_weight_sync_errors(manifest: dict[str, object]) -> None:
    try:
        parsed = Manifest.from_dict(manifest)
    except WeightSyncError:
        return
    assert Manifest.from_dict(parsed.to_dict()) == parsed
