"""Trainer rank 0 <-> rollout server: forms the weight group and pushes weights through it.

One push, in order:

    1. rank 0 -> buffer       AllocVersion -> VersionGranted: the number of the version (messages/consumer.py)
    2. rank 0 -> each server  AskAlive -> Alive: a server that does not reply in time is left out
    3. rank 0 -> each server  FormGroup -> WeightsOk: all members have joined the weight group
       rank 0                 with an engine that loads in place: every bucket is gathered and summed up first
    4. rank 0 -> each server  PushWeights: version, update mode, names, shapes and buckets of the tensors
    5. server -> rank 0       ReadyToReceive: its engine is paused if it has to be, and takes part now
    6. senders -> engines     when all are ready: every bucket, by torch.distributed over the weight group;
                              with several senders over the group of the bucket's sender
    7. rank 0 -> each server  PushChecksums: checksums (and digests) of the buckets that were sent
    8. server -> rank 0       received, checksums compared, swapped in: WeightsOk, the reply to PushWeights

Steps 2 and 3 are left out if the weight group of an earlier push still has the right members. Step 8
describes the embedded engine, which decodes while it receives; SGLang is paused after step 4, loads each
bucket in place and does not compare checksums. DissolveGroup ends a weight group after a failure or when its
members change. The life of one group is a session; the field `epoch` is its number.

Rank 0 connects a DEALER to the ROUTER at the `weights_address` of each server's hello. Tensors never travel
over this socket. Unless stated otherwise, the reply to a request is `WeightsOk` or `WeightsFailed`, and a
missing reply at the deadline counts as a failure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class AskAlive:
    """Rank 0 -> server, before a group is formed: servers that do not reply in time are left out of it.

    The reply is `Alive`, or `WeightsFailed` from a server without an engine.
    """


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Server -> rank 0: the properties of its engine that a group depends on."""

    version: int
    """Version that is active now."""
    num_ranks: int
    """Number of ranks that the engine has in a group: its tensor-parallel ranks."""
    device: str
    """`cpu`, `cuda`, ..."""
    device_uuid: str
    """UUID of the GPU; empty on a CPU or if the engine does not report it."""
    nccl_version: str
    """The engine's NCCL version, e.g. `2.27.5`; empty without NCCL or if the engine does not report it."""
    authenticates_store: bool
    """True if the engine can join a group whose rendezvous is authenticated (`FormGroup.secret`)."""
    loads_in_place: bool = False
    """True if the engine does not decode while it receives: rank 0 then has every bucket ready before it
    sends `PushWeights`."""


@dataclass(frozen=True, kw_only=True)
class SenderAddress:
    """Where the store of one sender's weight group listens."""

    address: str
    port: int


@dataclass(frozen=True, kw_only=True)
class FormGroup:
    """Rank 0 -> server: join the weight group, or with several senders the group of each of them.

    The reply follows once the server has joined; all members join at the same time.

    With M senders (`weights.senders`) there are M groups: sender j is rank 0 of group j and sends the buckets
    j, j + M, j + 2 M, ...; the engines have the same ranks in all of them.
    """

    epoch: int
    """Number of the session, one more for each group formed (not a pass over the prompts)."""
    group_name: str
    master_address: str
    master_port: int
    rank: int
    """Rank of the engine's first rank in the group, the others follow it; the sender is rank 0."""
    world_size: int
    backend: str
    """`gloo` | `nccl`."""
    timeout_s: float
    secret: str = field(repr=False)
    """Key of the values in the rendezvous store, 32 bytes in hexadecimal; empty: values are not
    authenticated."""
    more_senders: list[SenderAddress] = field(default_factory=list)
    """The stores of senders 1, 2, ...; that of sender 0 is at `master_address`."""

    @property
    def num_senders(self) -> int:
        """Number of groups to join."""
        return 1 + len(self.more_senders)

    def of_sender(self, number: int) -> FormGroup:
        """The group of one sender, numbered from 0, as a request for that group alone."""
        if number == 0:
            return replace(self, more_senders=[])
        sender = self.more_senders[number - 1]
        return replace(
            self,
            group_name=group_name_of(self.group_name, sender=number),
            master_address=sender.address,
            master_port=sender.port,
            more_senders=[],
        )


def group_name_of(group_name: str, *, sender: int) -> str:
    """Name of a sender's group in a session whose first group is `group_name`."""
    return f"{group_name}.{sender}" if sender else group_name


@dataclass(frozen=True, kw_only=True)
class PushWeights:
    """Rank 0 -> server: receive the buckets of this manifest, verify and activate them.

    The reply follows once the weights are active.

    The manifest has no checksums, because the first bucket may travel while the last is still being gathered;
    `PushChecksums` follows.
    """

    max_header_bytes: ClassVar[int] = 4 << 20
    """A mixture of experts: 40,000 tensors with names of 60 characters."""

    epoch: int
    group_name: str
    version: int
    step: int
    update_mode: str
    manifest: dict[str, Any]
    """`areal_like.weights.buckets.Manifest` as a plain mapping."""
    integrity: str
    """`sha256`: digests follow, and they must agree. `none`: only checksums."""
    timeout_s: float
    base_version: int = -1
    """Version that the engine must have active, if a header precedes each bucket and only the words that
    changed may follow (`areal_like.weights.deltas`); -1: all bytes are sent."""
    base_digest: str = ""
    """`WeightsOk.base_digest` of that version."""


@dataclass(frozen=True, kw_only=True)
class ReadyToReceive:
    """Server -> rank 0, after `PushWeights`: the engine takes part in the broadcast from now on; no reply.

    Rank 0 sends the first bucket when every server is ready. Over NCCL a broadcast that began earlier would
    occupy a part of its GPU until the last engine has paused. The server sends this message again with each
    `Alive` while it receives, because a renewed key may have interrupted the connection.
    """

    version: int
    """Version of the push."""


@dataclass(frozen=True, kw_only=True)
class PushChecksums:
    """Rank 0 -> server, after the last bucket of a push; no reply.

    Weights are activated only if the checksums (and the digests) agree.
    """

    max_header_bytes: ClassVar[int] = 4 << 20
    """70 bytes for each bucket; a bucket has at least one of `PushWeights`' tensors."""

    version: int
    checksums: list[int]
    """`areal_like.weights.buckets.checksum` of each bucket, in the order of the manifest."""
    digests: list[str]
    """SHA-256 of each bucket in hexadecimal, with `PushWeights.integrity=sha256`; else empty."""


@dataclass(frozen=True, kw_only=True)
class DissolveGroup:
    """Rank 0 -> server: leave the group, also during a broadcast.

    The broadcast's `PushWeights` then gets `WeightsFailed`.
    """

    epoch: int
    group_name: str


@dataclass(frozen=True, kw_only=True)
class WeightsOk:
    """Server -> rank 0: the group is joined or left, or the push is active."""

    version: int
    """Version that is active now."""
    seconds: float = 0.0
    """Time from the request to activation."""
    stall_seconds: float = 0.0
    """Part of that time in which no token was decoded."""
    base_digest: str = ""
    """`areal_like.weights.integrity.weights_digest` of the active weights if the next push may send only what
    differs from them; else empty."""


@dataclass(frozen=True, kw_only=True)
class WeightsFailed:
    """Server -> rank 0: the push or the group failed; `version` is still active."""

    version: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ScoreTokens:
    """Rank 0 -> server, after a push: compute these tokens' log-probs with the engine's active weights.

    The reply is `TokenScores`, or `WeightsFailed` if the engine cannot do it now. Only the peer that formed
    the weight group may send this request.
    """

    tokens: list[int]
    first: int
    """Index, at least 1, of the first token to score."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Server -> rank 0: the log-probs that the engine computed."""

    version: int
    """Version that the engine reports for these log-probs."""
    logprobs: list[float]
    """At temperature 1, one for each token from `ScoreTokens.first` on."""


TO_SERVER = (AskAlive, FormGroup, PushWeights, PushChecksums, DissolveGroup, ScoreTokens)
"""The messages that rank 0 sends."""
TO_TRAINER = (Alive, ReadyToReceive, WeightsOk, WeightsFailed, TokenScores)
"""The messages that servers send."""
MESSAGES = (*TO_SERVER, *TO_TRAINER)
