"""Brings together the ranks of one start of the trainer, at a store that may have seen earlier starts.

torchrun keeps one store over its restarts. Ranks that came too early would find the addresses of an earlier
start there, and wait for processes that are gone. So rank 0 writes a new token, every rank signs under it
with a name of its own, and rank 0 closes the list when it is complete. A rank that finds itself in the list
has met the others; one that finds a list without itself has read an earlier token and looks again.

    rank 0:  token                           rank r:  token?
             <token>/r of all ranks?  <----           <token>/r = name
             <token>/all = names      ---->           names[r] is mine: met
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ArealError

_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """All ranks of one start."""

    token: str
    """Prefix of this start's keys in the store."""
    names: Sequence[str]
    """Names of the ranks, with machine and pid, for messages."""
    store: Any = None
    """Kept open until this rank ends: rank 0's process serves it to the others."""


def meet(store: Any, *, rank: int, world_size: int, timeout_s: float) -> Meeting:
    """Waits until all ranks have come. Collective.

    `store`: torch's, which all ranks reach. Raises ArealError that names the absent ranks, and passes on what
    the store raises.
    """
    end_s = time.monotonic() + timeout_s
    me = [f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})", secrets.token_hex(8)]
    token = ""
    if rank == 0:
        token = secrets.token_hex(16)
        store.set("token", token)
    while time.monotonic() < end_s:
        if rank:
            token = store.get("token").decode() if store.check(["token"]) else ""
        if token:
            store.set(f"{token}/{rank}", json.dumps(me))
            if rank == 0 and not _absent(store, token, world_size):
                members = [json.loads(store.get(f"{token}/{other}")) for other in range(world_size)]
                store.set(f"{token}/all", json.dumps(members))
            if store.check([f"{token}/all"]):
                members = json.loads(store.get(f"{token}/all"))
                if members[rank] == me:
                    return Meeting(token=token, names=[name for name, _ in members])
        time.sleep(_POLL_S)
    absent = ", ".join(map(str, _absent(store, token, world_size))) if token else "0"
    raise ArealError(f"ranks that have not come within {timeout_s:g} s: {absent or 'all others have gone'}")


def _absent(store: Any, token: str, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"{token}/{rank}"])]
