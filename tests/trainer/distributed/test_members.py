"""Ranks that meet, watch one another and report a failure; the start of a part of the ranks."""

import contextlib
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_like.config import Config, RolloutConfig, SglangConfig, TrainerConfig
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from tests.support import warm_start
from tests.support.buffer_harness import ROOT
from tests.support.ports import held_port
from tests.support.waiting import HANG_LIMIT_S
from trainer.distributed import process_group
from trainer.distributed.connections import interface_towards
from trainer.distributed.members import Liveness
from trainer.distributed.process_group import Meeting, meet
from trainer.distributed.ranks import RankPhase, Ranks
from trainer.distributed.spawn import start_ranks
from trainer.distributed.variables import set_torch_variables
from trainer.metrics.speed import PhaseTimer


def meet_all(store: Any, ranks: range, *, timeout_s: float = HANG_LIMIT_S) -> list[Meeting]:
    """The result of each rank of three, in threads."""
    found: dict[int, Meeting] = {}

    def run(rank: int) -> None:
        found[rank] = meet(store, rank=rank, world_size=3, timeout_s=timeout_s)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


@pytest.mark.parametrize("error", [None, ConfigError("a mistake"), RuntimeError("out of memory")])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_rank_that_fails_leaves_its_groups(
    monkeypatch: pytest.MonkeyPatch, is_alone: bool, error: Exception | None
) -> None:
    """Over NCCL this would wait for the others, and they for the end of its process."""
    destroyed: list[bool] = []

    def joined(config: Config, device: torch.device) -> Meeting | None:
        Ranks.alone()  # creates the default group
        return None if is_alone else Meeting(token="", names=["rank 0"])

    monkeypatch.setattr(process_group, "join_ranks", joined)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    with (
        contextlib.suppress(ConfigError, RuntimeError),
        process_group.joined_ranks(Config(name="x"), torch.device("cpu")),
    ):
        if error is not None:
            raise error
    assert bool(destroyed) == (is_alone or error is None)


def test_ranks_do_not_meet_those_of_an_earlier_start() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    first = meet_all(store, range(3))
    assert {meeting.token for meeting in first} == {first[0].token} and len(set(first[0].names)) == 3

    early: list[Meeting] = []
    ranks = [
        threading.Thread(
            target=lambda r=rank: early.append(meet(store, rank=r, world_size=3, timeout_s=HANG_LIMIT_S))
        )
        for rank in (1, 2)
    ]
    for thread in ranks:
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive(), "it has met the ranks of the first start"
    again = meet(store, rank=0, world_size=3, timeout_s=HANG_LIMIT_S)
    for thread in ranks:
        thread.join()
    assert {meeting.token for meeting in early} == {again.token} != {first[0].token}


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    with pytest.raises(ArealError, match=r"have not arrived within 0.2 s: 1, 2"):
        meet(store, rank=0, world_size=3, timeout_s=0.2)
    with pytest.raises(ArealError, match=r"within 0.2 s: 0"):
        meet(dist.HashStore(), rank=1, world_size=3, timeout_s=0.2)  # type: ignore[attr-defined]


def test_a_counter_that_stands_still_is_reported_once() -> None:
    liveness = Liveness()
    for now_s, counters in ((0.0, {0: 1, 1: 1}), (5.0, {0: 2, 1: 1}), (10.0, {0: 3, 1: 1})):
        liveness.observe(counters, now_s=now_s)
    assert liveness.silent(now_s=10.0, for_s=10.0) == [1]
    assert liveness.newly_silent(now_s=10.0, for_s=10.0) == [1]
    assert liveness.newly_silent(now_s=11.0, for_s=10.0) == []
    liveness.observe({0: 3, 1: 2}, now_s=12.0)
    assert liveness.newly_silent(now_s=12.0, for_s=10.0) == []
    assert liveness.newly_silent(now_s=22.0, for_s=10.0) == [0, 1]


def test_a_failed_block_keeps_its_phase() -> None:
    place = RankPhase()
    timer = PhaseTimer(("compute_s", "wait_s"), place=place)
    place.enter("lockstep", step=4)
    place.next_microbatch()
    with timer.span("compute_s"):
        assert str(place) == "step 4, micro-batch 1, compute"
    assert str(place) == "step 4, micro-batch 1, lockstep"
    with pytest.raises(ZeroDivisionError), timer.span("wait_s"):
        _ = 1 / 0
    assert str(place) == "step 4, micro-batch 1, wait"


@pytest.mark.parametrize("how", [pytest.param("stop", marks=pytest.mark.long), "raise"])
def test_the_other_ranks_name_the_one_that_failed(tmp_path: Path, how: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.lost_rank", str(tmp_path), "3", how]
    warm_start.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "codes").read_text() == "1 1"
    for rank in (0, 1):
        last = (tmp_path / f"rank-{rank}.log").read_text().splitlines()[-1]
        assert f"rank {rank} (" in last and "failed at step 7, micro-batch 3, compute: RuntimeError" in last
        if how == "stop":
            assert "no response from rank 2 (" in last and last.endswith("stopped or gone")
        else:
            assert "the first to fail was rank 2 (" in last and last.endswith("CUDA out of memory")
        traces = RunPaths.of(Config(name="x", runs_dir=str(tmp_path))).traces
        record = json.loads((traces / f"gloo_rank_{rank}.json").read_text())
        assert record["entries"][-1]["profiling_name"] == "gloo:all_reduce"


RANK = """
import os, sys, time
from pathlib import Path
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "AREAL_LIKE_STORE_FD")
Path("rank-" + os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
"""


def test_each_machine_starts_its_part_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_rank.py").write_text(RANK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with held_port() as port:
        at = f"127.0.0.1:{port}"
        for index in (0, 1):
            code = start_ranks(
                [], world_size=4, module="one_rank", num_hosts=2, host_index=index, rendezvous=at
            )
            assert code == 0
    ranks = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(4)]
    assert [rank[:4] for rank in ranks] == [
        ["0", "0", "4", "127.0.0.1"],
        ["1", "1", "4", "127.0.0.1"],
        ["2", "0", "4", "127.0.0.1"],
        ["3", "1", "4", "127.0.0.1"],
    ]
    assert [rank[4] == "-1" for rank in ranks] == [False, True, True, True]
    with pytest.raises(ConfigError, match=r"rendezvous=203\.0\.113\.7:29400: machine 0 cannot listen there"):
        start_ranks([], world_size=2, num_hosts=2, host_index=0, rendezvous="203.0.113.7:29400")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hosts": 2, "world_size": 4}, "give the address of machine 0"),
        ({"num_hosts": 2, "world_size": 3, "rendezvous": "a:1"}, "cannot be divided evenly"),
        ({"num_hosts": 2, "world_size": 4, "rendezvous": "a:1", "host_index": 2}, "use 0 to 1"),
    ],
)
def test_settings_of_several_machines_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**settings)


def test_an_open_meeting_place_needs_keys() -> None:
    settings = ("trainer.num_hosts=2", "trainer.world_size=2", "trainer.rendezvous=192.0.2.1:29400")
    command = [sys.executable, "-m", "trainer", *settings]
    refused = warm_start.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert refused.returncode == 2
    assert "trainer.rendezvous=192.0.2.1 is not a loopback address" in refused.stderr


def test_the_interface_of_an_address() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such host") == ""


def test_torch_variables_of_gpu_ranks(tmp_path: Path) -> None:
    config = Config(name="x", runs_dir=str(tmp_path), trainer=TrainerConfig(device="cuda"))
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    set_torch_variables(config, environment)
    assert environment == {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/x/traces/nccl_rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert (tmp_path / "x" / "traces").is_dir()
    sglang = SglangConfig(args="--enable-nccl-nvls", env={"NCCL_CUMEM_ENABLE": 1})
    for engine, nccl in (
        (RolloutConfig(engine="sglang"), ("0", "0")),
        (RolloutConfig(engine="sglang", sglang=sglang), ("1", "1")),
    ):
        beside_sglang: dict[str, str] = {}
        set_torch_variables(replace(config, rollout=engine), beside_sglang)
        assert (beside_sglang["NCCL_CUMEM_ENABLE"], beside_sglang["NCCL_NVLS_ENABLE"]) == nccl
    on_a_cpu: dict[str, str] = {}
    set_torch_variables(Config(name="y", runs_dir=str(tmp_path)), on_a_cpu)
    assert on_a_cpu == {} and not (tmp_path / "y").exists()
