"""Trainer rank 0 <-> rollout server: forming the broadcast group and pushing weights through it.

Rank 0 connects a DEALER to the ROUTER that each server names in its hello. Tensor bytes go over torch.distributed, never over this
socket. Requests are answered with their `rid` by `WeightsOk` or `WeightsFailed` unless they say otherwise; silence past the deadline
counts as failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AskAlive:
    """Rank 0 -> server, before a group is formed: whoever does not answer at once is not waited for in a rendezvous. Answered `Alive`, or
    `WeightsFailed` by a server without an engine."""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Server -> rank 0: what its engine is, as far as a group has to know."""

    version: int
    """Version that is active now."""
    num_ranks: int
    """Places that the engine takes in a group: its tensor-parallel ranks."""
    device: str
    """`cpu`, `cuda`, ..."""
    device_uuid: str
    """Which GPU; empty on a CPU or where the engine does not say."""
    nccl_version: str
    """As `2.27.5`; empty without NCCL or where the engine does not say."""


@dataclass(frozen=True, kw_only=True)
class FormGroup:
    """Rank 0 -> server: join the process group of this epoch. Answered once joined (all members join at the same time)."""

    epoch: int
    group_name: str
    master_address: str
    master_port: int
    rank: int
    """Of the engine's first rank; the trainer is 0, and an engine with several ranks takes the places from here on."""
    world_size: int
    backend: str
    """`gloo` | `nccl`."""
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class PushWeights:
    """Rank 0 -> server: receive the buckets of this manifest, verify, activate. Answered once the version is active.

    The manifest tells no checksums: the first bucket travels while the last is still being gathered. `PushChecksums` follows.
    """

    epoch: int
    group_name: str
    version: int
    step: int
    update_mode: str
    manifest: dict[str, Any]
    """`areal_like.weights.buckets.Manifest` as a plain mapping."""
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class PushChecksums:
    """Rank 0 -> server, after the last bucket of a push; no answer. Nothing is activated before it has come and agrees."""

    version: int
    checksums: list[int]
    """`areal_like.weights.buckets.checksum` of each bucket, in the order of the manifest."""


@dataclass(frozen=True, kw_only=True)
class DissolveGroup:
    """Rank 0 -> server: leave the process group, also in the middle of a broadcast (whose `PushWeights` is then answered as failed)."""

    epoch: int
    group_name: str


@dataclass(frozen=True, kw_only=True)
class WeightsOk:
    """Server -> rank 0."""

    version: int
    """Version that is active now."""
    seconds: float = 0.0
    """Time from the request to activation."""
    stall_seconds: float = 0.0
    """Part of it in which no token was decoded."""


@dataclass(frozen=True, kw_only=True)
class WeightsFailed:
    """Server -> rank 0: the push or the group failed; `version` is what is active still."""

    version: int
    reason: str


MESSAGES = (AskAlive, Alive, FormGroup, PushWeights, PushChecksums, DissolveGroup, WeightsOk, WeightsFailed)
