"""A trainer on two simulated machines (network namespaces): a rank, an agent and a machine are lost, and the
run goes on with another number of machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.runtime.command_line import load_config, save_config
from launch.audit.run import audit_run
from launch.local_job.child import RUN_MARKER
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

pytestmark = [pytest.mark.timeout(2 * TEST_LIMIT_S), pytest.mark.chaos]

HOSTS = ("10.231.9.1", "10.231.9.2", "10.231.9.3")
DRAINED = 75
AT = f"{HOSTS[0]}:29400"


class Machines:
    """Network namespaces on one virtual switch, in the namespace of the first."""

    def __init__(self) -> None:
        self.names = [f"areal-{os.getpid()}-m{index}" for index in range(len(HOSTS))]

    def ip(self, *words: str) -> None:
        """Runs `ip WORDS`."""
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def make(self) -> None:
        """Makes them; skips the test where that is not allowed."""
        try:
            for name in self.names:
                self.ip("netns", "add", name)
                self.ip("-n", name, "link", "set", "lo", "up")
            self.ip("-n", self.names[0], "link", "add", "switch", "type", "bridge")
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"may not make network namespaces: {getattr(error, 'stderr', error)}")
        self.ip("-n", self.names[0], "addr", "add", f"{HOSTS[0]}/24", "dev", "switch")
        self.ip("-n", self.names[0], "link", "set", "switch", "up")
        for index, name in enumerate(self.names[1:], start=1):
            near, far = f"port{index}", f"ar{os.getpid()}f{index}"
            self.ip(
                "link",
                "add",
                near,
                "netns",
                self.names[0],
                "type",
                "veth",
                "peer",
                "name",
                far,
                "netns",
                name,
            )
            self.ip("-n", self.names[0], "link", "set", near, "master", "switch", "up")
            self.ip("-n", name, "link", "set", far, "name", "cable", "up")
            self.ip("-n", name, "addr", "add", f"{HOSTS[index]}/24", "dev", "cable")

    def cut(self, index: int) -> None:
        """Takes a machine from the switch: its packets vanish, and nobody is told."""
        self.ip("-n", self.names[0], "link", "set", f"port{index}", "nomaster")

    def mend(self, index: int) -> None:
        """Undoes `cut`."""
        self.ip("-n", self.names[0], "link", "set", f"port{index}", "master", "switch")

    def remove(self) -> None:
        """Removes them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Cluster:
    """The job's processes on the machines."""

    def __init__(self, folder: Path, machines: Machines, cache: dict[str, str]) -> None:
        self.folder, self.machines, self.root = folder, machines, folder / "runs" / "x"
        self.settings = [
            "name=x",
            f"runs_dir={folder}/runs",
            "resume=auto",
            "security.insecure=true",
            "model.warm_start_steps=0",
            "task._target_=tests.support.rollout_tasks.Checksum",
            "sampling.group_size=4",
            "trainer.groups_per_step=8",
            "trainer.num_steps=100000",
            "trainer.lr_schedule=constant",
            "trainer.checkpoint_interval=5",
            "max_staleness=2",
            "eval.num_prompts=0",
            "rollout.max_running=16",
            "rollout.queue_samples=8",
            f"buffer.host={HOSTS[0]}",
            "buffer.port=5555",
            f"weights.host={HOSTS[0]}",
            f"daemon.exit_code_on_drain={DRAINED}",
        ]
        marker = {RUN_MARKER: f"{self.root}:test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment = os.environ | marker | cache
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, machine: int, *command: str) -> subprocess.Popen[bytes]:
        """Starts `python -m COMMAND` on a machine, with the job's settings after it."""
        inside = ["ip", "netns", "exec", self.machines.names[machine], sys.executable, "-m", *command]
        process = subprocess.Popen([*inside, *self.settings], cwd=self.folder, env=self.environment)
        self.started.append(process)
        return process

    def trainer(self, num_machines: int, ranks_each: int) -> list[subprocess.Popen[bytes]]:
        """A trainer of our own start on the first machines."""
        world = (f"trainer.world_size={num_machines * ranks_each}", f"trainer.num_hosts={num_machines}")
        at = f"trainer.rendezvous={AT}"
        return [
            self.start(index, "trainer", *world, f"trainer.host_index={index}", at)
            for index in range(num_machines)
        ]

    def torchrun(self, *options: str) -> list[subprocess.Popen[bytes]]:
        """A trainer of two ranks on each of the first two machines."""
        host, _, port = AT.partition(":")
        common = ("--nnodes", "2", "--nproc-per-node", "2", "--master-addr", host, "--master-port", port)
        return [
            self.start(
                index, "torch.distributed.run", *common, "--node-rank", str(index), *options, "-m", "trainer"
            )
            for index in (0, 1)
        ]

    def ranks_of(self, starter: subprocess.Popen[bytes]) -> list[int]:
        """Process ids of the ranks that this process has started."""
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def steps(self, more: int = 8) -> None:
        """Waits for more steps."""
        wait_for_steps(num_steps_done(self.root) + more, self.root)

    def end(self, trainers: list[subprocess.Popen[bytes]], *, within_s: float) -> list[int]:
        """Waits until the trainer has ended everywhere, without orphans; returns the exit codes."""
        started_s = time.monotonic()
        wait_until(
            lambda: all(trainer.poll() is not None for trainer in trainers) and not self.trainer_processes(),
            what=f"the trainer ends within {within_s:g} s",
            timeout_s=within_s,
        )
        print(f"ended after {time.monotonic() - started_s:.1f} s")
        return [trainer.returncode for trainer in trainers]

    def trainer_processes(self) -> list[str]:
        """Command lines of the trainer's processes."""
        return [line for line in processes_of(self.root).values() if "-m trainer" in line]

    def log_of(self, rank: int) -> str:
        """Messages of a rank's log."""
        lines = (self.root / "logs" / f"trainer-{rank}.log").read_text().splitlines()
        return "\n".join(json.loads(line)["message"] for line in lines)


@pytest.fixture
def cluster(tmp_path: Path, cache: dict[str, str]) -> Iterator[Cluster]:
    """Buffer on the first machine, a rollout server on the second; nothing may be left at the end."""
    machines = Machines()
    try:
        machines.make()
        cluster = Cluster(tmp_path, machines, cache)
        save_config(load_config(cluster.settings), cluster.root / "config.yaml")
        assert cluster.start(0, "trainer.prepare_model").wait(timeout=120) == 0
        cluster.start(0, "buffer")
        cluster.start(1, "rollout_server", "--name", "rollout-0", f"rollout.host={HOSTS[1]}")
        yield cluster
        for process in reversed(cluster.started):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        assert not processes_of(cluster.root)
    finally:
        for pid in processes_of(tmp_path / "runs" / "x"):
            os.kill(pid, signal.SIGKILL)
        machines.remove()


def check_run(cluster: Cluster) -> None:
    """The audit is clean, and no step is missing or twice in the metrics."""
    audit: Any = audit_run(cluster.root)
    assert audit.is_clean, audit
    rows = [json.loads(line) for line in (cluster.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_machines_of_our_own_start(cluster: Cluster) -> None:
    trainers = cluster.trainer(2, 2)
    cluster.steps()
    os.kill(cluster.ranks_of(trainers[1])[-1], signal.SIGKILL)
    codes = cluster.end(trainers, within_s=30)
    assert codes[0] == 1 and codes[1] == 128 + signal.SIGKILL, codes
    for rank in (0, 1, 2):
        assert "no response from rank 3 (" in cluster.log_of(rank)

    trainers = cluster.trainer(2, 2)
    cluster.steps()
    cluster.machines.cut(1)
    codes = cluster.end(trainers, within_s=120)
    cluster.machines.mend(1)
    assert codes == [1, 1]
    assert "has not responded for 10 s" in cluster.log_of(0) and "Connection timed out" in cluster.log_of(0)

    for num_machines, ranks_each in ((1, 2), (3, 1)):
        trainers = cluster.trainer(num_machines, ranks_each)
        cluster.steps()
        trainers[-1].terminate()
        assert cluster.end(trainers, within_s=60) == [DRAINED] * num_machines
    check_run(cluster)


def test_agents_of_torchrun(cluster: Cluster) -> None:
    agents = cluster.torchrun()
    cluster.steps()
    agents[1].kill()
    codes = cluster.end(agents, within_s=60)
    assert codes == [1, -signal.SIGKILL], "torchrun's code of a drain is 1"
    assert "the process that started this rank is gone" in cluster.log_of(2) + cluster.log_of(3)
    newest = max((cluster.root / "checkpoints").iterdir())
    assert int(newest.name.removeprefix("step_")) == num_steps_done(cluster.root), "it has drained"

    agents = cluster.torchrun("--max-restarts", "3")
    cluster.steps()
    os.kill(cluster.ranks_of(agents[1])[-1], signal.SIGKILL)
    cluster.steps(12)
    assert all(agent.poll() is None for agent in agents), "torchrun has restarted the ranks"
    for agent in agents:
        agent.terminate()
    cluster.end(agents, within_s=60)
    check_run(cluster)
