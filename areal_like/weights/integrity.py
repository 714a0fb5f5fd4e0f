"""The sums over the bytes of a push that sender and receiver compare before the weights become active.

The checksum of a bucket is fast and finds errors in transit. Its SHA-256 (`weights.integrity=sha256`) finds
any change, so that weights cannot be replaced unnoticed between trainer and engine, as long as the control
channel that carries the digests is authentic (`security.keys`). The embedded engine computes them as it
receives (rollout_server/engine/weights/bucket_receiver.py); its rollout server compares them
(rollout_server/weights/shadow.py).

`weights_digest` combines the sums of all buckets. It names the base of a push that sends only what changed
(`weights.delta`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from areal_like.weights.buckets import Bucket


@dataclass(frozen=True, kw_only=True)
class BucketSums:
    """Sums of the buckets of one push, in the order of sending."""

    checksums: list[int]
    """`areal_like.weights.buckets.checksum` of each bucket."""
    digests: list[str]
    """`sha256` of each bucket; empty with `weights.integrity=none`."""


def sha256(flat: torch.Tensor) -> str:
    """SHA-256 of a contiguous uint8 buffer, in hexadecimal. Releases the GIL while it reads the buffer."""
    return hashlib.sha256(flat.cpu().numpy().data).hexdigest()


def weights_digest(buckets: Sequence[Bucket], sums: BucketSums) -> str:
    """SHA-256 in hexadecimal over the layout and the sums of all buckets, whichever way they were sent."""
    layout = [bucket.to_dict() | {"checksum": None} for bucket in buckets]
    return hashlib.sha256(json.dumps([layout, sums.checksums, sums.digests]).encode()).hexdigest()


def difference(*, received: BucketSums, sent: BucketSums, num_buckets: int, integrity: str) -> str:
    """Describes the first bucket of a received push that differs; empty if none does.

    `integrity`: `none` compares checksums only; `sha256` also requires a digest for each bucket.
    """
    if wrong := _first_difference(received.checksums, sent.checksums, num_buckets):
        return f"{wrong}: the checksum is wrong, its bytes changed in transit"
    if integrity == "sha256" and (wrong := _first_difference(received.digests, sent.digests, num_buckets)):
        return f"{wrong}: the SHA-256 is wrong, its bytes were changed"
    return ""


def _first_difference(received: Sequence[object], sent: Sequence[object], num_buckets: int) -> str:
    if not len(received) == len(sent) == num_buckets:
        return f"sums of {len(sent)} buckets were sent and of {len(received)} received, want {num_buckets}"
    for index, (ours, theirs) in enumerate(zip(received, sent, strict=True)):
        if ours != theirs:
            return f"bucket {index} of {num_buckets}"
    return ""
