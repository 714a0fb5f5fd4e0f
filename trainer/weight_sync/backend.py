"""NCCL or gloo for the process group of a weight push."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from areal_like.wire.messages.weights import Alive

log = logging.getLogger(__name__)


def choose_backend(wanted: str, *, ours: dict[str, str], engines: Sequence[Alive]) -> tuple[str, str]:
    """Returns (`nccl` or `gloo`, reason why gloo replaces a wanted NCCL; empty if it does not).

    `wanted`: `auto`, `nccl` or `gloo`. `ours`: `device_facts` of the trainer.
    """
    if wanted == "gloo":
        return "gloo", ""
    devices = (ours["device"], *(engine.device for engine in engines))
    if not all(device.startswith("cuda") for device in devices):
        return "gloo", "trainer and engines are not all on GPUs" if wanted == "nccl" else ""
    # SGLang reports neither its NCCL version nor its GPU's UUID: both are empty then and are not compared.
    versions = {v for v in (ours["nccl_version"], *(engine.nccl_version for engine in engines)) if v}
    if len(versions) > 1:
        return "gloo", f"NCCL versions differ: {', '.join(sorted(versions))}"
    uuids = [uuid for uuid in (ours["device_uuid"], *(engine.device_uuid for engine in engines)) if uuid]
    if len(set(uuids)) < len(uuids):
        return "gloo", "two of trainer and engines share a GPU"
    return "nccl", ""


class NcclTrial:
    """Falls back to gloo when the first push over NCCL breaks. Pure.

    `choose_backend` cannot see every reason why NCCL fails (SGLang reports neither its NCCL version nor its
    GPU), so the first push is the test.

        UNTRIED -> a push succeeded -> PROVEN: later failures do not change the backend
                -> a push broke     -> FAILED: `auto` means gloo from now on; `nccl` stays NCCL
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        """The value of `weights.backend`, replaced by gloo after a failed trial."""
        self._is_proven = False

    def report(self, *, broken_reason: str) -> None:
        """Records the outcome of a push over NCCL; `broken_reason` is empty if it succeeded."""
        if not broken_reason:
            self._is_proven = True
        elif self.wanted == "auto" and not self._is_proven:
            self.wanted = "gloo"
            log.warning(
                "weights travel over gloo from now on: the first push over NCCL broke (%s); "
                "set weights.backend=nccl to keep NCCL",
                broken_reason,
            )
