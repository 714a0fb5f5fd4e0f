"""The device of a trainer rank, and the default process group that it joins."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from areal_like.config import Config
from areal_like.errors import ConfigError
from trainer.distributed.spawn import STORE_FD


def join_ranks(config: Config, device: torch.device) -> None:
    """Creates the default process group: of this process alone, of `spawn.py`'s ranks, or of torchrun's."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=config.trainer.collective_timeout_s)
    if "RANK" not in os.environ:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
    elif (listen_fd := os.environ.get(STORE_FD)) is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            rank == 0,
            timeout,
            wait_for_workers=False,
            # Bound to loopback by the parent process: torch itself would listen on every interface.
            master_listen_fd=int(listen_fd) if rank == 0 else None,
        )
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout)


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
    return device
