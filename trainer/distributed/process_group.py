"""Chooses the device of a trainer rank, and lets the ranks of one start form the default process group.

The ranks meet at a store that may contain earlier starts: torchrun keeps one store over its restarts. Early
ranks would find the addresses of an earlier start there, and wait for processes that are gone. So rank 0
writes a new token, every rank registers a unique name under it, and rank 0 publishes the list of names when
it is complete. A rank that finds its name in the list has met the others; a rank that finds a list without
its name has read an earlier token and tries again.

    rank 0:  token                           rank r:  token?
             <token>/r of all ranks?  <----           <token>/r = name
             <token>/all = names      ---->           names[r] is mine: met
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.paths import RunPaths
from trainer.distributed.connections import RankConnections, choose_interface
from trainer.distributed.members import Members, first_line
from trainer.distributed.ranks import Ranks
from trainer.distributed.spawn import STORE_FD

log = logging.getLogger(__name__)

_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """All ranks of one start."""

    token: str
    """Prefix of this start's keys in the store."""
    names: Sequence[str]
    """Names of the ranks, with machine and pid, for messages."""
    store: Any = None
    """The store, kept open until this rank ends: rank 0's process serves it to the others."""


def meet(store: Any, *, rank: int, world_size: int, timeout_s: float) -> Meeting:
    """Waits until all ranks have come. Collective.

    `store`: torch's store, which all ranks reach. Raises ArealError that names the absent ranks, and the
    store's own errors.
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
    raise ArealError(
        f"ranks that have not arrived within {timeout_s:g} s: {absent or 'all others have left'}"
    )


def _absent(store: Any, token: str, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"{token}/{rank}"])]


_MEMBERS_TIMEOUT = timedelta(seconds=10)
_STUCK_SHARE = 0.8
"""Share of the collectives' time limit after which a rank logs its phase."""


@contextlib.contextmanager
def joined_ranks(
    config: Config,
    device: torch.device,
    *,
    control_timeout_s: float | None = None,
    quiet: tuple[type[Exception], ...] = (UserError,),
) -> Iterator[Ranks]:
    """The ranks of this trainer, in their default process group; leaves it at the end. Collective.

    When the block fails, except with a `quiet` error, a line in the log names the phase of this rank, and the
    ranks that are gone or failed first; torch's record of its last collectives goes into the run's `traces/`.
    One of several ranks then has to end its process: it stays in the group. Raises ConfigError if a step has
    fewer groups than there are data ranks.
    """
    meeting = join_ranks(config, device)
    has_failed = True
    try:
        ranks = Ranks(
            device=device,
            control_timeout_s=control_timeout_s,
            context_parallel=config.trainer.context_parallel,
            replicas=config.trainer.replicas,
            collective_timeout_s=config.trainer.collective_timeout_s,
        )
        if config.trainer.groups_per_step < ranks.num_data:
            raise ConfigError(
                f"trainer.groups_per_step={config.trainer.groups_per_step} must be at least the number of "
                f"data ranks, {ranks.num_data}"
            )
        if ranks.context is not None:
            log.info(
                "%d ranks compute each micro-batch together: %d context groups",
                ranks.context.size,
                ranks.num_data,
            )
        if ranks.replicas is not None:
            log.info("%d replicas of %d ranks each", ranks.num_replicas, ranks.num_shards)
        connections = RankConnections()
        connections.end_when_dead()
        members = watch_members(ranks, meeting, timeout_s=config.trainer.collective_timeout_s)
        try:
            yield ranks
        except quiet:
            raise
        except Exception as error:  # raised again: this only adds information to the log
            _report(error, ranks, members, connections, RunPaths.of(config).traces)
            raise
        finally:
            if members is not None:
                members.close()
        has_failed = False
    finally:
        # After an error the other ranks may be in any collective. Over NCCL, destroying the group waits for
        # kernels that wait for them, while they wait for this process to end.
        if meeting is None or not has_failed:
            dist.destroy_process_group()


def _report(
    error: Exception, ranks: Ranks, members: Members | None, connections: RankConnections, traces: Path
) -> None:
    if members is None:
        log.error("failed at %s", ranks.place)
        return
    reason = f"{type(error).__name__}: {first_line(error)}"
    cause = members.failed(reason, end_connections=connections.end)
    log.error("%s failed at %s: %s; %s", members.names[ranks.rank], ranks.place, reason, cause)
    with contextlib.suppress(OSError):  # a full disk must not hide the error
        write_collectives(traces, ranks.rank)


def join_ranks(config: Config, device: torch.device) -> Meeting | None:
    """Creates the default process group: of this process alone, of `spawn.py`'s ranks, or of torchrun's.

    Returns the ranks that have met; None for a single process. Raises ArealError if not all ranks have
    arrived within `trainer.collective_timeout_s`.
    """
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout_s = config.trainer.collective_timeout_s
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        alone = dist.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    choose_interface(os.environ["MASTER_ADDR"])
    log.info("rank %d waits for all %d ranks at %s", rank, world_size, where)
    try:
        store = _store_of(rank, world_size, timeout)
        meeting = meet(store, rank=rank, world_size=world_size, timeout_s=timeout_s)
        own = dist.PrefixStore(meeting.token, store)
        dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=world_size)
    except (ArealError, RuntimeError) as error:  # RuntimeError: torch's DistError
        raise ArealError(
            f"rank {rank} has not met all {world_size} ranks at {where} ({error}): start the trainer on "
            "every machine with the same settings, and see the logs of the other ranks"
        ) from error
    return replace(meeting, store=store)


def _store_of(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The store at which the ranks meet: rank 0's, or that of torchrun's agent."""
    if (listen_fd := os.environ.get(STORE_FD)) is None:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return store
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        rank == 0,
        timeout,
        wait_for_workers=False,
        # Bound to one address by the parent process: torch itself would listen on every interface.
        master_listen_fd=int(listen_fd) if rank == 0 else None,
    )


def watch_members(ranks: Ranks, meeting: Meeting | None, *, timeout_s: float) -> Members | None:
    """Starts to watch the other ranks of `join_ranks`; None for a single rank.

    `timeout_s`: the time limit of the ranks' collectives.
    """
    if meeting is None or ranks.world_size == 1:
        return None

    def open_store() -> Any:
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_MEMBERS_TIMEOUT,
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"{meeting.token}/members", own)

    return Members(
        open_store,
        names=meeting.names,
        rank=ranks.rank,
        place=ranks.place,
        stuck_after_s=_STUCK_SHARE * timeout_s,
    )


def write_collectives(folder: Path, rank: int) -> None:
    """Writes torch's record of this rank's last collectives as JSON, if torch has one."""
    for name, dump in (("gloo", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        if (function := getattr(torch._C._distributed_c10d, dump, None)) is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / f"{name}_rank_{rank}.json").write_bytes(function())


def device_of(config: Config) -> torch.device:
    """The device of this rank. Raises ConfigError if this machine does not have it."""
    if config.trainer.device == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    index = int(config.trainer.device.partition(":")[2] or 0) + local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"trainer.device={config.trainer.device}: rank {local_rank} of this machine needs GPU "
            f"{index}, and {torch.cuda.device_count()} are visible"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # cuDNN's attention, which torch prefers on some GPUs (B200), takes about half a second to plan every new
    # shape, and almost every packed micro-batch has a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device
