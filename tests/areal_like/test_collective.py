"""The weight group over real processes: repeated forming, SGLang's receiver, and failures without delay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from areal_like.errors import WeightSyncError
from areal_like.weights.weight_group import WeightGroup
from tests.support import warm_start
from tests.support.waiting import HANG_LIMIT_S

NUM_BYTES = 1 << 16

JOIN = """
import sys, torch
from areal_like.weights.weight_group import WeightGroup
port, rank, world_size, rounds = (int(arg) for arg in sys.argv[1:5])
timeout_s = 3600.0
for _ in range(rounds):
    group = WeightGroup.join(master_address="127.0.0.1", master_port=port, rank=rank, world_size=world_size,
                             group_name="w", timeout_s=timeout_s)
    print("joined", flush=True)
    if sys.stdin.readline().strip() == "sleep":
        import time; time.sleep(3600)
    buffer = torch.empty(1 << 16, dtype=torch.uint8)
    group.broadcast(buffer)
    print(int(buffer.long().sum()), flush=True)
    group.close()
    line = sys.stdin.readline().strip()
    port = int(line) if line else port
"""

# The torch calls of SGLang 0.5's init_custom_process_group and update_weights_from_distributed.
SGLANG = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed.distributed_c10d import _new_process_group_helper, _world
from torch.distributed.distributed_c10d import Backend, PrefixStore, rendezvous
port, rank, world_size = (int(a) for a in sys.argv[1:4])
timeout = timedelta(seconds=600)
store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=timeout))
store.set_timeout(timeout)
group, _ = _new_process_group_helper(world_size, rank, [], Backend("gloo"), PrefixStore("w", store),
                                     group_name="w", backend_options=None, timeout=timeout)
_world.pg_group_ranks[group] = {i: i for i in range(world_size)}
print("joined", flush=True)
buffer = torch.empty(1 << 16, dtype=torch.uint8)
dist.broadcast(buffer, src=0, group=group)
print(int(buffer.long().sum()), flush=True)
dist.destroy_process_group(group)
"""


@contextmanager
def receiver(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    process = warm_start.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def create(*, world_size: int = 2, timeout_s: float = HANG_LIMIT_S) -> WeightGroup:
    return WeightGroup.create(world_size=world_size, group_name="w", timeout_s=timeout_s)


def test_two_receivers_twice_under_one_group_name() -> None:
    payload = torch.arange(NUM_BYTES).to(torch.uint8)
    group = create(world_size=3)
    with receiver(JOIN, group.port, 1, 3, 2) as one, receiver(JOIN, group.port, 2, 3, 2) as two:
        for _ in range(2):
            group.connect()
            assert [read_line(one), read_line(two)] == ["joined", "joined"]
            write_line(one, "")
            write_line(two, "")
            group.broadcast(payload)
            assert read_line(one) == read_line(two) == str(int(payload.long().sum()))
            group.close()
            group = create(world_size=3)
            write_line(one, str(group.port))
            write_line(two, str(group.port))
        group.close()


def test_is_compatible_with_sglangs_receiver() -> None:
    payload = torch.arange(NUM_BYTES).to(torch.uint8)
    with create() as group, receiver(SGLANG, group.port, 1, 2) as process:
        group.connect()
        assert read_line(process) == "joined"
        group.broadcast(payload)
        assert read_line(process) == str(int(payload.long().sum()))


def test_killed_receiver_fails_the_broadcast_at_once() -> None:
    with create(timeout_s=3600) as group, receiver(JOIN, group.port, 1, 2, 1) as process:
        group.connect()
        assert read_line(process) == "joined"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(WeightSyncError, match="broadcast failed"):
            group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8))
        with pytest.raises(WeightSyncError, match="not connected"):
            group.broadcast(torch.zeros(1, dtype=torch.uint8))


def test_hung_receiver_fails_the_broadcast_at_the_timeout() -> None:
    with create() as group, receiver(JOIN, group.port, 1, 2, 1) as process:
        group.connect()
        assert read_line(process) == "joined"
        write_line(process, "sleep")
        group.timeout_s = 2.0  # joining may take longer
        started = time.monotonic()
        with pytest.raises(WeightSyncError, match="broadcast failed"):
            group.broadcast(torch.zeros(64 << 20, dtype=torch.uint8))
        assert time.monotonic() - started > 1.9


def test_closing_sender_releases_the_receiver_at_once() -> None:
    with create() as group, receiver(JOIN, group.port, 1, 2, 1) as process:
        group.connect()
        assert read_line(process) == "joined"
        write_line(process, "")
        time.sleep(0.3)
        group.close()
        assert process.wait() == 1


def test_broadcast_of_a_closed_group_fails() -> None:
    with create() as group, receiver(JOIN, group.port, 1, 2, 1) as process:
        group.connect()
        assert read_line(process) == "joined"
        wait = group.begin_broadcast(torch.ones(NUM_BYTES, dtype=torch.uint8))
        group.close()
        write_line(process, "")
        assert read_line(process) == str(NUM_BYTES)
        with pytest.raises(WeightSyncError, match="closed during a broadcast"):
            wait()


def test_broadcast_has_its_own_timeout() -> None:
    with create() as group, receiver(JOIN, group.port, 1, 2, 1) as process:
        group.connect()
        assert read_line(process) == "joined"
        group.timeout_s = 0.5
        threading.Timer(2.0, write_line, (process, "")).start()
        group.broadcast(torch.ones(NUM_BYTES, dtype=torch.uint8), timeout_s=HANG_LIMIT_S)
        assert read_line(process) == str(NUM_BYTES)


def test_waits_end_and_bad_arguments_are_reported() -> None:
    with create(timeout_s=2) as group, pytest.raises(WeightSyncError, match="rank 0 of 2 could not connect"):
        group.connect()
    with pytest.raises(WeightSyncError, match=r"no store at 127.0.0.1:1:"):
        WeightGroup.join(
            master_address="127.0.0.1", master_port=1, rank=1, world_size=2, group_name="w", timeout_s=2
        )
    with pytest.raises(WeightSyncError, match="backend 'mpi'"):
        WeightGroup.create(world_size=2, group_name="w", backend="mpi", timeout_s=1)
    with pytest.raises(WeightSyncError, match="rank 2 is not below world_size 2"):
        WeightGroup.join(
            master_address="127.0.0.1", master_port=1, rank=2, world_size=2, group_name="w", timeout_s=1
        )
    with create() as group, pytest.raises(WeightSyncError, match=f"every port of .*{group.port} is taken"):
        WeightGroup.create(ports=[group.port], world_size=2, group_name="w", timeout_s=1)


def test_works_beside_a_default_group() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with create() as group, receiver(JOIN, group.port, 1, 2, 1) as process:
            group.connect()
            assert read_line(process) == "joined"
            write_line(process, "")
            group.broadcast(torch.ones(NUM_BYTES, dtype=torch.uint8))
            assert read_line(process) == str(NUM_BYTES)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()
