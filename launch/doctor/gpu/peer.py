"""Stage `peer`: two machines meet, compare versions, and measure the rate between them, over TCP and NCCL.

    listener, which has HOST     store at HOST:PORT -> facts/0 -> waits for facts/1 -> sends
    other machine                                   -> reads facts/0, writes facts/1 -> receives

Both run the same command. The listener is the machine that has the address HOST; on a single machine, the
first of two processes. Every value in the store carries a message authentication code of the token that both
have, so a stranger who reaches the port can end the check but cannot take part in it; no code or object is
ever received, only facts in JSON and numbers that both sides know beforehand. The groups are those of a push
of weights (`areal_like.weights`): gloo first, then NCCL if both machines have GPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from areal_like.errors import WeightSyncError, first_line
from areal_like.weights.rendezvous import AuthenticatedStore, open_store
from areal_like.weights.weight_group import WeightGroup, device_facts
from launch.doctor.gpu.stages import OK, Notes, Request, Verdict, failed, skipped
from trainer.metrics.speed import clock_of

MEET_S = 65.0
"""Time in which the second command has to be started."""
_GROUP_S = 20.0
"""Time limit of forming a group, and of each broadcast."""
_SENT_BYTES = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Sent over each backend; `cuda` if both machines have GPUs."""
_FACT_BYTES = 1 << 12
_NETWORK = "see that both machines reach each other on all ports (firewalls), and GLOO_SOCKET_IFNAME"
_NCCL = "run once with NCCL_DEBUG=INFO; set NCCL_SOCKET_IFNAME; without RDMA set NCCL_IB_DISABLE=1"

_dist: Any = dist


def check_peer(request: Request, notes: Notes) -> Verdict:
    """Meets the other machine and measures."""
    if not request.peer:
        return skipped("no --peer HOST:PORT was given")
    host, _, port = request.peer.rpartition(":")
    host, secret = host.strip("[]"), hashlib.sha256(request.token.encode()).hexdigest()
    device = torch.device("cuda", 0) if request.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    server: Any = None
    try:
        try:
            # A socket in the state of a closed connection may be bound again, one that listens may not.
            server, store, _ = open_store(host=host, ports=(int(port),), timeout_s=MEET_S)
        except (WeightSyncError, ValueError):  # taken by the other process, or an address of another machine
            store = _dist.TCPStore(
                host, int(port), None, False, timedelta(seconds=MEET_S), wait_for_workers=False
            )
        rank = 0 if server is not None else 1
        notes.measured(peer_role="listener" if rank == 0 else "second machine")
        return _Meeting(store, rank=rank, host=host, secret=secret, device=device, notes=notes).run()
    except (RuntimeError, WeightSyncError) as error:  # RuntimeError: torch's DistError
        return failed(
            f"the machines have not met: {first_line(error)}",
            f"start the same command with the same token on both within {MEET_S:g} s; {_NETWORK}",
        )


class _Meeting:
    """One side of the check. Every wait ends after `_GROUP_S`, the first one after `MEET_S`."""

    def __init__(
        self, store: Any, *, rank: int, host: str, secret: str, device: torch.device, notes: Notes
    ) -> None:
        self._inner = store
        self._store = AuthenticatedStore(store, bytes.fromhex(secret))
        self._rank, self._host, self._secret = rank, host, secret
        self._device, self._notes = device, notes
        self._num_bytes = _SENT_BYTES["cpu"]

    def run(self) -> Verdict:
        """Compares the facts of both sides, then sends over each backend that both have."""
        verdict = self._compare()
        with contextlib.suppress(RuntimeError, WeightSyncError):
            # The process of the listener serves the store, so it ends last.
            if self._rank == 0:
                self._get("done")
            else:
                self._put("done", {})
        return verdict

    def _compare(self) -> Verdict:
        self._notes.at("waiting for the other machine")
        facts = {**device_facts(self._device), "torch": torch.__version__}
        self._put("facts", facts)
        theirs = self._get("facts")
        self._inner.set_timeout(timedelta(seconds=_GROUP_S))
        if not theirs.keys() >= facts.keys():
            return failed("the other machine has another release", "install the same release on both")
        have_gpus = facts["nccl_version"] and theirs["nccl_version"]
        self._num_bytes = _SENT_BYTES["cuda" if have_gpus else "cpu"]
        self._notes.measured(peer_torch=str(theirs["torch"])[:40], peer_nccl=str(theirs["nccl_version"])[:40])
        verdict = self._send("gloo", torch.device("cpu"), remedy=_NETWORK)
        if verdict is not OK or not have_gpus:
            return verdict
        if theirs["nccl_version"] != facts["nccl_version"]:
            return failed(
                f"NCCL {facts['nccl_version']} here and {theirs['nccl_version']} there",
                "install the same torch on both machines",
            )
        if theirs["device_uuid"] == facts["device_uuid"]:
            return OK  # two processes on one GPU, which NCCL cannot join
        return self._send("nccl", self._device, remedy=_NCCL)

    def _send(self, backend: str, device: torch.device, *, remedy: str) -> Verdict:
        self._notes.at(f"connecting over {backend}")
        settings: dict[str, Any] = {
            "world_size": 2,
            "group_name": f"doctor-{backend}",
            "backend": backend,
            "timeout_s": _GROUP_S,
            "secret": self._secret,
        }
        try:
            if self._rank == 0:
                group = WeightGroup.create(host=self._host, **settings)
                self._put(f"port-{backend}", {"port": group.port})
                group.connect()
            else:
                port = int(self._get(f"port-{backend}")["port"])
                group = WeightGroup.join(master_address=self._host, master_port=port, rank=1, **settings)
            with group:
                rate, is_right = _measure(group, device, num_bytes=self._num_bytes, sends=self._rank == 0)
        except WeightSyncError as error:
            return failed(f"{backend}: {first_line(error)}", remedy)
        self._put(f"received-{backend}", {"is_right": is_right})
        theirs = self._get(f"received-{backend}")
        self._notes.measured(**{f"peer_{backend}_gb_per_s": round(rate / 1e9, 3)})
        if not (is_right and theirs["is_right"] is True):
            return failed(f"{backend}: data has changed on its way", remedy)
        return OK

    def _put(self, name: str, facts: Mapping[str, Any]) -> None:
        self._store.set(f"{name}/{self._rank}", json.dumps(facts).encode())

    def _get(self, name: str) -> dict[str, Any]:
        """What the other side has put. Raises WeightSyncError if it is not from a holder of the token."""
        raw = self._store.get(f"{name}/{1 - self._rank}")
        if len(raw) > _FACT_BYTES:
            raise WeightSyncError("the other machine sends more than was expected")
        found = json.loads(raw)
        if not isinstance(found, dict):
            raise WeightSyncError("the other machine sends something else than was expected")
        return found


def _measure(group: WeightGroup, device: torch.device, *, num_bytes: int, sends: bool) -> tuple[float, bool]:
    """(bytes per second of a broadcast, whether what arrived is what both sides expect)"""
    expected = torch.arange(num_bytes // 8, device=device)
    tensor = expected.clone() if sends else torch.zeros_like(expected)
    group.broadcast(tensor[:1024].clone())  # both sides are ready
    clock = clock_of(device)
    start = clock.mark()
    group.broadcast(tensor)
    (seconds,) = clock.seconds([(start, clock.mark())])
    return tensor.numel() * tensor.itemsize / max(seconds, 1e-9), torch.equal(tensor, expected)
