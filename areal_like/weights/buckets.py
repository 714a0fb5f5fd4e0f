"""Packs named tensors into a few large broadcasts (buckets), which the receiver can verify.

A **bucket** is one uint8 buffer with the bytes of several tensors, in the order of its list of names and
without padding. This is the layout of SGLang's `flattened_bucket`, so that both engines receive the same
broadcast. A receiver views slices of the buffer as tensors, so every offset must be a multiple of the item
size of the tensor's dtype. Padding would break SGLang's layout, so the tensors of a bucket are ordered by
decreasing item size: the length of each tensor is then a multiple of all item sizes that follow.

Specs, buckets and manifests are plain data. This module imports torch only in the functions that handle
tensors.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from areal_like.errors import WeightSyncError
from areal_like.weights.adapters import AdapterHeader

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Dtypes that can be sent, by torch's names, with their item sizes in bytes."""

MAX_TENSORS = 1 << 20
MAX_DIM = 1 << 40
MAX_NUM_DIMS = 16
_LANES = 128
_BLOCK_BYTES = 256 << 10
_PIECE_BLOCKS = 2
"""Blocks per piece in `checksum_and_finiteness`: few enough to stay in a core's cache for the second read."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one tensor.

    Raises WeightSyncError for an unsupported dtype or a malformed shape.
    """

    name: str
    dtype: str
    """torch's name: `float32`, `bfloat16`, ..."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise WeightSyncError(f"tensor name: want a non-empty string, got {self.name!r}")
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            raise WeightSyncError(
                f"tensor {self.name}: dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}"
            )
        if len(self.shape) > MAX_NUM_DIMS or not all(
            type(size) is int and 0 <= size <= MAX_DIM for size in self.shape
        ):
            raise WeightSyncError(f"tensor {self.name}: shape {list(self.shape)!r} is not a list of sizes")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The tensors of one broadcast. Offsets and length are computed from the tensors and not stored."""

    tensors: tuple[TensorSpec, ...]
    checksum: int | None = None
    """`checksum` of the flattened bytes. None if the sender supplies it after the broadcasts, so that the
    first broadcast need not wait for it."""

    def __post_init__(self) -> None:
        if not self.tensors:
            raise WeightSyncError("a bucket needs at least one tensor")

    @property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each tensor."""
        offsets, position = [], 0
        for spec in self.tensors:
            offsets.append(position)
            position += spec.num_bytes
        return tuple(offsets)

    @property
    def num_bytes(self) -> int:
        """Length of the flattened buffer."""
        return sum(spec.num_bytes for spec in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON or msgpack."""
        return {
            "names": [spec.name for spec in self.tensors],
            "dtypes": [spec.dtype for spec in self.tensors],
            "shapes": [list(spec.shape) for spec in self.tensors],
            "checksum": self.checksum,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Bucket:
        """Inverse of `to_dict`; also reads the body of `/update_weights_from_distributed`.

        Raises WeightSyncError.
        """
        columns = [raw.get(key) for key in ("names", "dtypes", "shapes")]
        if not all(isinstance(column, list) and len(column) <= MAX_TENSORS for column in columns):
            raise WeightSyncError("bucket: names, dtypes and shapes must be lists")
        names, dtypes, shapes = (list(column) for column in columns if isinstance(column, list))
        if not len(names) == len(dtypes) == len(shapes) or not all(
            isinstance(shape, (list, tuple)) for shape in shapes
        ):
            raise WeightSyncError("bucket: names, dtypes and shapes must have one entry per tensor")
        stated = raw.get("checksum")
        if stated is not None and type(stated) is not int:
            raise WeightSyncError(f"bucket: checksum must be an integer, got {stated!r}")
        specs = zip(names, dtypes, shapes, strict=True)
        return cls(
            tensors=tuple(
                TensorSpec(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in specs
            ),
            checksum=stated,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a push: its version, and its buckets in the order of sending."""

    version: int
    buckets: tuple[Bucket, ...]
    adapter: AdapterHeader | None = None
    """If the buckets hold a LoRA adapter and not all weights: its header."""
    untrained: tuple[str, ...] = ()
    """Tensors in the files of the model that training leaves as they are, and that no push contains."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all buckets."""
        return sum(bucket.num_bytes for bucket in self.buckets)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor, in the order of sending."""
        return tuple(spec for bucket in self.buckets for spec in bucket.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON or msgpack."""
        plain: dict[str, Any] = {
            "version": self.version,
            "buckets": [bucket.to_dict() for bucket in self.buckets],
        }
        if self.adapter is not None:
            plain["adapter"] = self.adapter.to_dict()
        if self.untrained:
            plain["untrained"] = list(self.untrained)
        return plain

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_dict`. Raises WeightSyncError."""
        version, buckets = raw.get("version"), raw.get("buckets")
        if (
            type(version) is not int
            or not isinstance(buckets, list)
            or not all(isinstance(b, Mapping) for b in buckets)
        ):
            raise WeightSyncError("manifest: want an integer `version` and a list of `buckets`")
        header, untrained = raw.get("adapter"), raw.get("untrained", [])
        if (
            not isinstance(untrained, list)
            or len(untrained) > MAX_TENSORS
            or not all(isinstance(name, str) for name in untrained)
        ):
            raise WeightSyncError("manifest: `untrained` must be a list of names")
        return cls(
            version=version,
            buckets=tuple(Bucket.from_dict(bucket) for bucket in buckets),
            adapter=None if header is None else AdapterHeader.from_dict(header),
            untrained=tuple(untrained),
        )


def cut_buckets(tensors: Iterable[TensorSpec], *, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cuts tensors into buckets of at most `bucket_bytes`, in order; a larger tensor gets its own bucket.

    Within a bucket, tensors are sorted by decreasing item size (stable), which aligns offsets without
    padding.
    """
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in tensors:
        if not groups or spec.num_bytes > room:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(spec)
        room -= spec.num_bytes
    return tuple(
        Bucket(tensors=tuple(sorted(group, key=lambda spec: -ITEM_BYTES[spec.dtype]))) for group in groups
    )


def spec_of(name: str, tensor: torch.Tensor, *, dtype: str | None = None) -> TensorSpec:
    """The spec of `tensor`, or of `tensor` cast to `dtype` (bf16 weights sent from fp32 masters)."""
    return TensorSpec(
        name=name, dtype=dtype or str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
    )


def flatten(bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Copies the tensors, cast to the bucket's dtypes, into one uint8[bucket.num_bytes] buffer on the CPU.

    Creates no temporary tensors. Raises WeightSyncError for an absent tensor or one with another shape.
    """
    import torch

    flat = torch.empty(bucket.num_bytes, dtype=torch.uint8)
    for spec, view in zip(bucket.tensors, unflatten(bucket, flat).values(), strict=True):
        if spec.name not in tensors:
            raise WeightSyncError(f"tensor {spec.name} is in the manifest but not among the weights")
        source = tensors[spec.name]
        if tuple(source.shape) != spec.shape:
            raise WeightSyncError(
                f"tensor {spec.name}: shape {list(source.shape)}, but {list(spec.shape)} in the manifest"
            )
        view.copy_(source.detach())
    return flat


def unflatten(bucket: Bucket, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of a uint8[bucket.num_bytes] buffer as the bucket's tensors, by name, without copying."""
    import torch

    if flat.dtype != torch.uint8 or flat.numel() != bucket.num_bytes:
        raise WeightSyncError(f"bucket: want uint8[{bucket.num_bytes}], got {flat.dtype}{list(flat.shape)}")
    views = {}
    for spec, offset in zip(bucket.tensors, bucket.offsets, strict=True):
        if offset % ITEM_BYTES[spec.dtype]:
            raise WeightSyncError(
                f"tensor {spec.name}: offset {offset} is not a multiple of {ITEM_BYTES[spec.dtype]} bytes: "
                "order the tensors of a bucket by decreasing item size (see cut_buckets)"
            )
        piece = flat[offset : offset + spec.num_bytes]
        views[spec.name] = piece.view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


def checksum(flat: torch.Tensor) -> int:
    """A 32-bit checksum of a contiguous uint8 buffer, computed at memory bandwidth.

    zlib.crc32 alone would take as long as the broadcast. So blocks of 256 KiB are first summed to 1 KiB each,
    as 64-bit words in 128 lanes on the buffer's device; the CRC covers these sums and the remaining bytes.
    The checksum detects any change within one word, and bytes moved to another lane or block.
    """
    import torch

    num_blocks = flat.numel() // _BLOCK_BYTES
    head, tail = flat[: num_blocks * _BLOCK_BYTES], flat[num_blocks * _BLOCK_BYTES :]
    return _crc(head.view(torch.int64).view(num_blocks, -1, _LANES).sum(1) if num_blocks else head, tail)


def _crc(sums: torch.Tensor, tail: torch.Tensor) -> int:
    return zlib.crc32(tail.cpu().numpy().data, zlib.crc32(sums.cpu().numpy().data))


def is_finite(values: torch.Tensor) -> bool:
    """True if no value is NaN or infinite. Reads the values once and writes no mask."""
    import torch

    if not values.numel():
        return True
    # If the sum is finite, so are all terms, and a sum is faster than min and max. Otherwise the sum may have
    # overflowed, and min and max decide.
    return bool(torch.isfinite(values.sum())) or all(map(bool, map(torch.isfinite, torch.aminmax(values))))


def checksum_and_finiteness(flat: torch.Tensor, *, dtype: torch.dtype) -> tuple[int, bool]:
    """`checksum(flat)`, and `is_finite` of its bytes viewed as `dtype`.

    On a CPU both are computed piece by piece: memory bandwidth limits both, and the second pass over a piece
    reads it from the cache.
    """
    import torch

    num_blocks = flat.numel() // _BLOCK_BYTES
    if flat.is_cuda or not num_blocks:
        return checksum(flat), is_finite(flat.view(dtype))
    head, tail = flat[: num_blocks * _BLOCK_BYTES], flat[num_blocks * _BLOCK_BYTES :]
    lanes, values = head.view(torch.int64).view(num_blocks, -1, _LANES), head.view(dtype).view(num_blocks, -1)
    sums, totals = [], []
    for piece in zip(torch.split(lanes, _PIECE_BLOCKS), torch.split(values, _PIECE_BLOCKS), strict=True):
        sums.append(piece[0].sum(1))
        totals.append(piece[1].sum())
    all_finite = is_finite(torch.stack(totals)) or is_finite(values)  # the sums alone may have overflowed
    return _crc(torch.cat(sums), tail), all_finite and is_finite(tail.view(dtype))


def check_names(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: Iterable[str] = (),
) -> None:
    """Compares the tensors of a push with a model's parameters (`shapes` by name).

    Raises WeightSyncError with the differences.

    `tied`: names that alias another parameter (a tied `lm_head.weight`); they may be sent or left out.
    """
    aliases = set(tied)
    sent = Counter(spec.name for spec in specs)
    problems = []
    if unknown := [name for name in sent if name not in shapes and name not in aliases]:
        problems.append(f"unknown to the model: {_some(unknown)}")
    if missing := [name for name in shapes if name not in sent and name not in aliases]:
        problems.append(f"missing: {_some(missing)}")
    if repeated := sorted(name for name, times in sent.items() if times > 1):
        problems.append(f"sent twice: {_some(repeated)}")
    wrong = [spec for spec in specs if spec.name in shapes and tuple(shapes[spec.name]) != spec.shape]
    if wrong:
        first = wrong[0]
        want = list(shapes[first.name])
        problems.append(
            f"wrong shape: {_some([s.name for s in wrong])} "
            f"({first.name}: want {want}, got {list(first.shape)})"
        )
    if problems:
        raise WeightSyncError("weights do not fit the model: " + "; ".join(problems))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
