"""Two buffer shards with real sockets and processes: one of them is killed, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from areal_like.config import Config
from areal_like.shards import Shard, all_shards
from areal_like.wire.addresses import buffer_addresses
from launch.audit.run import audit_run
from launch.observation.reach import RunningJob
from tests.chaos.job import chaos_config, check_counters, check_groups, counters_of, train
from tests.support.buffer_harness import ROOT, BufferProcess
from tests.support.launching import (
    TEST_LIMIT_S,
    finish,
    launcher,
    num_steps_done,
    processes_of,
    wait_for_steps,
)
from tests.support.ports import free_ports
from tests.support.quick import only_in_chaos
from trainer.buffer_client.client import TrainerBufferClient

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)

NUM_STEPS, GROUPS_PER_STEP = 10, 5


class ShardedJob:
    """Two buffers and two producers that are connected to both."""

    def __init__(self, directory: Path, *, overdue: str) -> None:
        trainer = {"num_steps": NUM_STEPS, "groups_per_step": GROUPS_PER_STEP, "fetch_timeout_s": 600.0}
        ports = list(free_ports(num=2))  # nobody else takes the port of a killed buffer
        self.config: Config = chaos_config(
            directory,
            trainer=trainer,
            buffer={"num_shards": 2, "ports": ports, "lease_timeout_s": 10.0, "overdue": overdue},
            staleness={"close_after": 1},  # groups are closed as they begin, so all positions are of parts
        )
        self.buffers = [BufferProcess(self.config, name=shard.name) for shard in all_shards(2)]
        assert buffer_addresses(self.config) == [buffer.address for buffer in self.buffers]
        self._producers = [self._produce(f"rollout-{index}") for index in range(2)]

    def _produce(self, name: str) -> subprocess.Popen[bytes]:
        settings = ["--config", str(self.buffers[0].paths.config)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.producer", name, "32", "0.002", "64", *settings], cwd=ROOT
        )

    def kill(self, index: int) -> None:
        """Ends a buffer with SIGKILL."""
        self.buffers[index].close()

    def start_again(self, index: int) -> None:
        """Starts a killed buffer again, at its port and with its ledger."""
        self.buffers[index] = BufferProcess(self.config, name=f"buffer-{index}")

    @contextlib.contextmanager
    def trainer(self) -> Iterator[TrainerBufferClient]:
        """The buffer client of rank 0."""
        with TrainerBufferClient(
            self.config, rank=0, world_size=1, device="cpu", process=secrets.token_hex(16)
        ) as client:
            yield client

    def close(self) -> None:
        """Kills all processes."""
        for process in self._producers:
            process.kill()
            process.wait()
        for buffer in self.buffers:
            buffer.close()


@pytest.fixture(params=[*only_in_chaos("wait"), "close"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ShardedJob]:
    job = ShardedJob(tmp_path, overdue=request.param)
    try:
        yield job
    finally:
        job.close()


def test_a_dead_shard_stalls_the_step_and_loses_nothing(
    job: ShardedJob,
) -> None:
    with ThreadPoolExecutor(max_workers=1) as training, job.trainer() as client:
        groups = train(client, first=0, last=3)
        job.buffers[0].wait_status(
            lambda seen: [peer.get("weights_version") for peer in seen["peers"]].count(3) == 2
        )
        job.kill(1)
        assert sorted(RunningJob.in_directory(str(job.buffers[0].paths.root)).servers()) == [
            "rollout-0",
            "rollout-1",
        ], "both are registered with the other shard too"
        rest = training.submit(train, client, first=3, last=NUM_STEPS)
        # Groups are recorded one step ahead of the trainer and generated up to the staleness bound. The
        # shard that is alive fills its own three positions of each step.
        ahead = {"step": 5, "recorded": 0, "due_and_running": 0}
        closes = job.config.overdue == "close"
        filled = job.buffers[0].wait_status(
            lambda seen: (
                seen["open_step"] == ahead
                and (seen["tickets"]["ready"] == 3 or (closes and seen["parts"]["waiting"]))
            )
        )
        time.sleep(0.5)
        later = job.buffers[0].status()
        assert later["step"] == 3 and later["open_step"] == ahead and not rest.done()
        assert filled["tickets"]["batched"] + filled["tickets"]["trained"] == 15
        assert later["bound"] == (
            "close after 1 step: every trained token within 2 steps"
            if closes
            else "wait: every sample within 2 steps"
        )
        if not closes:
            assert later["tickets"] == filled["tickets"] and filled["tickets"]["issued"] == 18

        job.start_again(1)
        groups += rest.result()
        check_groups(groups, job.config, first=0, last=NUM_STEPS)
        for group in groups:
            shard = Shard.of(group.position, count=2)
            assert shard.owns(group.ticket_id) and bool(group.closed) == closes
            prompts = [one.prompt_index for one in group.closed] or [group.prompt_index]
            assert all(map(shard.owns, prompts))
        counters = counters_of(client)
        check_counters(counters)
        assert counters.tickets["trained"] == NUM_STEPS * GROUPS_PER_STEP
    for buffer in job.buffers:
        assert buffer.terminate()[0] == 0
    audit = audit_run(job.buffers[0].paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert (
        audit.facts["committed_steps"] == NUM_STEPS
        and audit.tickets["trained"] == NUM_STEPS * GROUPS_PER_STEP
    )
    assert bool(audit.tickets.get("split")) == closes


SMALL = (
    "name=x",
    "buffer.num_shards=2",
    "rollout.num_servers=2",
    "model.warm_start_steps=20",
    "sampling.group_size=4",
    "trainer.groups_per_step=5",
    "trainer.num_steps=30",
    "trainer.checkpoint_interval=10",
    "eval.num_prompts=8",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=30",
)


@pytest.mark.chaos
@pytest.mark.slow
def test_a_whole_run_survives_a_killed_shard(tmp_path: Path, cache: dict[str, str]) -> None:
    root = tmp_path / "runs" / "x"
    with launcher(*SMALL, cwd=tmp_path, environment=cache) as process:
        wait_for_steps(5, root, process=process)
        os.kill(
            next(
                pid
                for pid, command in processes_of(root).items()
                if "-m buffer " in command and "buffer-1" in command
            ),
            signal.SIGKILL,
        )
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert "buffer-1 ended (killed by SIGKILL): starting it again" in out and num_steps_done(root) == 30
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == 150 and audit.facts["committed_steps"] == 30
    assert not processes_of(root)
