"""NCCL or gloo for the process group of a weight push."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.weights.foreign_torch import NCCL_REMEDY, TorchVersions, check_engine_nccl
from areal_like.weights.weight_group import device_facts
from areal_like.wire.messages.weights import Alive
from trainer.weights.receivers import ReceiverId

log = logging.getLogger(__name__)

_VERSIONS_DIFFER = "NCCL versions differ"


def choose_backend(
    wanted: str, *, ours: dict[str, str], engines: Sequence[Alive], others: Sequence[dict[str, str]] = ()
) -> tuple[str, str]:
    """Returns (`nccl` or `gloo`, reason why gloo replaces a wanted NCCL; empty if it does not).

    `wanted`: `auto`, `nccl` or `gloo`. `ours`: `device_facts` of rank 0; `others`: of the other senders.
    """
    if wanted == "gloo":
        return "gloo", ""
    senders = (ours, *others)
    devices = (*(sender["device"] for sender in senders), *(engine.device for engine in engines))
    if not all(device.startswith("cuda") for device in devices):
        return "gloo", "trainer and engines are not all on GPUs" if wanted == "nccl" else ""
    # Empty values are unknown and not compared: SGLang reports no UUID, and at a URL no NCCL version either.
    ours_and_theirs = (*(s["nccl_version"] for s in senders), *(engine.nccl_version for engine in engines))
    versions = {version for version in ours_and_theirs if version}
    if len(versions) > 1:
        return "gloo", f"{_VERSIONS_DIFFER}: {', '.join(sorted(versions))}"
    all_uuids = (*(s["device_uuid"] for s in senders), *(engine.device_uuid for engine in engines))
    uuids = [uuid for uuid in all_uuids if uuid]
    if len(set(uuids)) < len(uuids):
        return "gloo", "two of trainer and engines share a GPU"
    return "nccl", ""


def refuse_mixed_nccl(
    wanted: str, *, ours: dict[str, str], engines: Sequence[Alive], others: Sequence[dict[str, str]] = ()
) -> None:
    """Raises ConfigError if only different versions of NCCL keep the first push from NCCL.

    Otherwise a run on GPUs would push over gloo, through the memory of the hosts, with one line in its log.
    """
    backend, reason = choose_backend(wanted, ours=ours, engines=engines, others=others)
    if wanted != "gloo" and backend == "gloo" and reason.startswith(_VERSIONS_DIFFER):
        raise ConfigError(f"trainer and engines: {reason}: {NCCL_REMEDY}")


def check_nccl(config: Config, device: torch.device) -> None:
    """Like `refuse_mixed_nccl`, but before the model is loaded, if SGLang's interpreter is on this machine.

    Called on rank 0."""
    if device.type == "cuda":
        nccl = device_facts(device)["nccl_version"]
        check_engine_nccl(config, ours=TorchVersions(torch=torch.__version__, nccl=nccl))


_MOST_BREAKS = 3
"""Pushes that may break before one has succeeded, whatever their members."""


class NcclTrial:
    """Falls back to gloo when the first pushes over NCCL break. Pure.

    `choose_backend` cannot see every reason why NCCL fails (SGLang does not report its GPU, nor at a URL its
    NCCL version), so the first pushes are the test. A broken push alone proves little, because an engine may
    have died in it: NCCL has failed if the next push to the same members breaks too, or any
    `_MOST_BREAKS` pushes do.

        UNTRIED     -> a push succeeded -> PROVEN: later failures do not change the backend
                    -> a push broke     -> TRIED AGAIN
        TRIED AGAIN -> a push succeeded -> PROVEN
                    -> a push broke     -> FAILED: `auto` means gloo from now on; `nccl` stays NCCL
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        """The value of `weights.backend`, replaced by gloo after a failed trial."""
        self._is_proven = False
        self._broken: list[frozenset[ReceiverId]] = []
        """Members of each push that broke before one had succeeded."""

    def report(self, *, broken_reason: str, members: frozenset[ReceiverId]) -> None:
        """Records the outcome of a push over NCCL; `broken_reason` is empty if it succeeded."""
        if not broken_reason:
            self._is_proven = True
        if self._is_proven or self.wanted != "auto":
            return
        has_failed = members in self._broken or len(self._broken) + 1 == _MOST_BREAKS
        self._broken.append(members)
        if has_failed:
            self.wanted = "gloo"
            log.warning(
                "weights travel over gloo from now on: no push over NCCL has succeeded, and %d broke (%s); "
                "set weights.backend=nccl to keep NCCL",
                len(self._broken),
                broken_reason,
            )
        else:
            log.warning(
                "a push over NCCL broke (%s), and none has succeeded yet: NCCL is tried again", broken_reason
            )
