"""Settings of weight synchronization, the pushes of new weights to running engines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from areal_like.config.common import Bounds, NonNegativeInt, PositiveInt, Section, require

MAX_TIMEOUT_S = 3600.0
"""Upper limit of `push_deadline_s` and `deadline_s`; a server refuses a request with a longer time limit."""
_AUTO_BUCKET_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
_TWO_SNAPSHOTS_BYTES = 32e9
_ANY_ADDRESS = ("0.0.0.0", "::", "[::]")
_MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Section, key="weights"):
    """Weight pushes from trainer rank 0 to the engines."""

    update_mode: Literal["auto", "recompute", "keep", "abort_resume", "drain"] = "auto"
    """Treatment of sequences in flight: `recompute` rebuilds their KV cache under the new weights, `keep`
    keeps the old KV cache, `abort_resume` interrupts them and resubmits the partial tokens, `drain` finishes
    them first. `auto`: `drain` with `buffer.group_filter=single_version` and a `sync_interval` above 1, as
    `objective=oapl` sets them, and with `lora=adapter` and SGLang on GPUs; `keep` otherwise with SGLang on
    GPUs (`rollout.engine_device`), else `recompute`."""
    lora: Literal["merged", "adapter"] = "merged"
    """What a push of a policy with a LoRA adapter carries. `merged`: all weights, with the adapter added to
    them. `adapter`: only the adapter's matrices, a few hundredths of the bytes; engines add it to the base
    model that they have loaded from `model.path`, and each running sequence can finish under the version
    that it began with (`update_mode=drain`)."""
    bucket_bytes: int = 0
    """Size of one flattened broadcast, in bytes; 0: 64 MiB where the trainer runs on a CPU, 512 MiB on
    GPUs."""
    num_snapshots: int | Literal["auto"] = "auto"
    """Copies of what is pushed that the trainer keeps in host memory. 2: training goes on while a push lasts
    longer than a step. 1: the next push's weights are copied when the push before has ended, and training
    waits for that. `auto`: 1 if a copy is larger than 32 GB and the trainer is on GPUs, where pushes take
    seconds and steps of such models minutes, unless `update_mode` is `drain`; else 2."""
    host: str = "127.0.0.1"
    """Address of trainer rank 0 for the weight group's rendezvous; every engine must be able to reach it."""
    port_range: str = ""
    """Ports for the weight group's rendezvous, as `20000-20099`; empty: any free port. `shared` uses one port
    at a time, `per_engine` one for each engine. The backend's data connections use different ports."""
    integrity: Literal["none", "sha256"] = "none"
    """`sha256`: rank 0 sends the SHA-256 of each bucket over the control channel, and a server activates only
    weights whose digests agree. Needs `rollout.engine=embedded`."""
    sync_interval: PositiveInt = 1
    """Optimizer steps between pushes (the weights after the last step are always pushed). Above 1 with
    `buffer.group_filter=single_version`, each interval trains only on groups sampled with the weights pushed
    at its start; groups left over at its end are dropped with reason `interval`."""
    push_deadline_s: Annotated[float, Bounds(0, MAX_TIMEOUT_S, excludes_low=True)] = 60.0
    """Time limit of a push, in seconds, at most 3600; the time that the bytes take at `min_bytes_per_s` is
    added to it. A receiver that has not responded by then is excluded from the weight group. With
    `update_mode=drain` the limit has to cover the longest completion that an engine finishes first."""
    min_bytes_per_s: Annotated[float, Bounds(1)] = 100e6
    """Rate assumed for the time limit of a push, in bytes per second: a push of n bytes may take
    `push_deadline_s` + n / `min_bytes_per_s` seconds, and at most 3600."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of the weight group; `auto`: NCCL where trainer and engine are on GPUs, else gloo."""
    topology: Literal["shared", "per_engine"] = "shared"
    """`shared`: one group with all engines, which receive the same broadcast. `per_engine`: one group per
    engine, so that a hung engine does not delay the others; all weights are then sent once per engine."""
    senders: PositiveInt = 1
    """Number M of trainer ranks that send: each gathers and broadcasts every M-th bucket, in a weight group
    of its own. At most `trainer.world_size` / `trainer.replicas`. More than one divides rank 0's part of a
    push, its memory for snapshots, and the traffic on its link to the engines."""
    delta: Literal["auto", "off"] = "off"
    """What a push sends of a bucket if the engines have activated the push before in the same weight group.
    `off`: all bytes. `auto`: the numbers that changed and their positions, unless they take more than half of
    the bucket; the engine verifies the whole result. Senders hold the last push in host memory for it, once
    more. Only with `rollout.engine=embedded`: SGLang gets all bytes, and so do pushes of adapters."""
    max_unavailable: NonNegativeInt = 0
    """Number of servers updated at the same time; 0: all. With a limit the other servers keep generating
    during an update that pauses the engine."""

    check_interval_s: float | None = 10.0
    """Shortest time, in seconds, between two checks of one engine: after a push the log-probs of a few tokens
    are compared with the trainer's; if they jump, the weights are pushed again. 0: after every push; null:
    no checks. Only with `sampling.temperature=1`."""

    def check(self) -> None:
        require(
            self.check_interval_s is None or self.check_interval_s >= 0,
            "weights.check_interval_s must be at least 0, or null for no checks",
        )
        require(
            self.num_snapshots in ("auto", 1, 2),
            f"weights.num_snapshots={self.num_snapshots}: use auto, 1 or 2",
        )
        require(bool(self.host), "weights.host is empty: give an address of the trainer's machine")
        require(
            self.bucket_bytes == 0 or self.bucket_bytes >= 1 << 10,
            "weights.bucket_bytes must be 0 (automatic) or at least 1024",
        )
        require(
            self.host not in _ANY_ADDRESS,
            f"weights.host={self.host} is not an address that engines can connect to: "
            "give one address of the trainer's machine",
        )
        require(
            not self.port_range or _parse_ports(self.port_range) is not None,
            f"weights.port_range={self.port_range!r}: give two ports from 1 to {_MAX_PORT}, as 20000-20099, "
            "or leave it empty",
        )

    def bucket_bytes_on(self, device: str) -> int:
        """`bucket_bytes`, chosen for the trainer's type of device (`cpu`, `cuda`) if it is 0."""
        return self.bucket_bytes or _AUTO_BUCKET_BYTES[device]

    def snapshots_on(self, device: str, *, num_bytes: float) -> int:
        """`num_snapshots`, chosen for the trainer's device (`cpu`, `cuda:N`) and the bytes of a push if it is
        `auto`."""
        if self.num_snapshots != "auto":
            return self.num_snapshots
        is_large = device != "cpu" and num_bytes > _TWO_SNAPSHOTS_BYTES
        return 1 if is_large and self.update_mode != "drain" else 2

    def delta_with(self, engine: str) -> Literal["auto", "off"]:
        """`delta`, or `off` if `rollout.engine` needs all bytes: SGLang's own processes receive tensors."""
        return self.delta if engine == "embedded" else "off"

    def deadline_s(self, num_bytes: int) -> float:
        """Time limit of a push of this many bytes, in seconds."""
        return min(MAX_TIMEOUT_S, self.push_deadline_s + num_bytes / self.min_bytes_per_s)

    @property
    def ports(self) -> range:
        """The ports of `port_range`; 0 alone (any free port) if it is empty."""
        return _parse_ports(self.port_range) or range(1)


def _parse_ports(text: str) -> range | None:
    """The ports from `first-last`; None for anything else."""
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text, re.ASCII)
    if match is None:
        return None
    first, last = map(int, match.groups())
    return range(first, last + 1) if 1 <= first <= last <= _MAX_PORT else None
