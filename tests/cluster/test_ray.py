"""A keyed run on a real Ray of four nodes: killed daemons, a lost node, a pool that grows, and a clean end.

Needs Ray in the environment of the tests (`pip install 'areal-like[ray]'`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal_like.paths import RunPaths
from tests.support.keys import new_keys
from tests.support.launching import ROOT, areal_like, num_steps_done
from tests.support.reward_models import write_scored_task
from tests.support.waiting import is_alive

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
pytest.importorskip("ray", reason="Ray is not installed")
MEMORY = 80_000_000
JOB = {
    "model": {"path": "tiny", "warm_start_steps": 0},
    "task": {"_target_": "tests.support.rollout_tasks.SlowChecksum"},
    "sampling": {"group_size": 4, "max_new_tokens": 6},
    "trainer": {"groups_per_step": 16, "checkpoint_interval": 10, "num_steps": 120},
    "buffer": {"lease_timeout_s": 5},
    "rollout": {"max_running": 8, "queue_samples": 4},
    "daemon": {"drain_timeout_s": 20, "linger_s": 5},
    "eval": {"num_prompts": 0},
    "security": {"keys": "keys"},
}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """The head, which runs nothing, and three nodes for two roles each."""
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    try:
        for _ in range(3):
            found.add_node(num_cpus=2, object_store_memory=MEMORY)
        yield found
    finally:
        found.shutdown()


class Run:
    """A run in a directory, with its driver."""

    def __init__(self, directory: Path, cluster: Any, *words: str) -> None:
        if not (directory / "keys").exists():
            new_keys(directory / "keys")
        (directory / "job.yaml").write_text(yaml.safe_dump(JOB))
        self.directory = directory
        self.paths = RunPaths(directory / "runs" / "x")
        self._output = directory / "driver.out"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        submit = ["submit", "--ray", "--address", cluster.address, "--config", "job.yaml", "name=x"]
        with self._output.open("wb") as output:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "launch", *submit, *words],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait(self, condition: Callable[[], object], what: str, *, timeout_s: float = 120) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert self.driver.poll() is None, f"the driver ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}\n{self.output}"
            time.sleep(0.3)

    def wait_for_progress(self, number: int = 3) -> None:
        before = num_steps_done(self.paths.root)
        self.wait(lambda: num_steps_done(self.paths.root) >= before + number, f"{number} more steps")

    def pid_of(self, prefix: str) -> int:
        """The process of a daemon, whose name begins so."""
        (endpoint,) = sorted(self.paths.endpoints.glob(f"{prefix}*.json"))[:1]
        return int(json.loads(endpoint.read_text())["pid"])

    def num_servers(self) -> int:
        done = areal_like("status", "x", "--json", cwd=self.directory)
        daemons = json.loads(done.stdout)["daemons"] if done.returncode == 0 else []
        return sum(one["role"] == "rollout" and one["state"] == "serving" for one in daemons)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _node_of(cluster: Any, pid: int) -> Any:
    """The node whose raylet is an ancestor of a process."""
    ancestors = []
    while pid > 1:
        pid = _parent(pid)
        ancestors.append(pid)
    for node in cluster.worker_nodes:
        raylets = [info.process.pid for info in node.all_processes["raylet"]]
        if set(raylets) & set(ancestors):
            return node
    raise AssertionError("no node has started the process")


def test_a_run_survives_kills_and_a_lost_node(tmp_path: Path, cluster: Any) -> None:
    run = Run(tmp_path, cluster, "--rollout-jobs", "2")
    try:
        run.wait_for_progress(5)
        for prefix, name in (("rollout-", "rollout server"), ("buffer", "the buffer")):
            os.kill(run.pid_of(prefix), signal.SIGKILL)
            run.wait(lambda name=name: f"{name}" in run.output.partition("failed (exit code 137")[0], name)
            run.wait_for_progress()
        trainer = run.pid_of("trainer-0")
        cluster.remove_node(_node_of(cluster, trainer), allow_graceful=False)
        run.wait(lambda: "the trainer is lost with its node" in run.output, "the loss of the trainer")
        assert not is_alive(trainer), "the trainer outlived its actor"
        run.wait(lambda: "the trainer is on" in run.output.partition("is lost with")[2], "another trainer")
        run.wait_for_progress()
        cluster.add_node(num_cpus=2, object_store_memory=MEMORY)
        assert areal_like("scale", "x", "3", cwd=tmp_path).returncode == 0
        run.wait(lambda: run.num_servers() == 3, "three servers")
        assert areal_like("scale", "x", "2", cwd=tmp_path).returncode == 0
        run.wait(lambda: run.num_servers() == 2, "two servers")
        assert run.driver.wait(300) == 0, run.output
    finally:
        run.driver.kill()
        run.driver.wait()
    assert json.loads(run.paths.summary.read_text())["finished"]
    audit = areal_like("audit", "x", cwd=tmp_path)
    assert audit.returncode == 0, audit.stdout
    assert not list(run.paths.endpoints.glob("*.json")) and not _processes_with(run.paths.root)


def test_score_servers_and_routers_are_actors(tmp_path: Path, cluster: Any) -> None:
    run = Run(tmp_path, cluster, "sessions.num_routers=1", *write_scored_task(tmp_path))
    try:
        run.wait_for_progress()
        scorer, router = run.pid_of("scorer-"), run.pid_of("router-")
        assert is_alive(router)
        os.kill(scorer, signal.SIGKILL)
        run.wait(lambda: "score server 0 failed (exit code 137" in run.output, "the end of the score server")
        run.wait_for_progress()
        assert run.driver.wait(300) == 0, run.output
    finally:
        run.driver.kill()
        run.driver.wait()
    summary = json.loads(run.paths.summary.read_text())
    assert summary["finished"] and not summary["selection"].get("failures")
    assert areal_like("audit", "x", cwd=tmp_path).returncode == 0
    assert not list(run.paths.endpoints.glob("*.json")) and not _processes_with(run.paths.root)


def test_a_signal_drains_and_missing_resources_are_said(tmp_path: Path, cluster: Any) -> None:
    run = Run(tmp_path, cluster, "--cpus", "7", "--wait", "5")
    assert run.driver.wait(120) == 1
    assert "Ray does not have the resources for 21 CPUs and 0 GPUs in 3 bundles" in run.output
    run = Run(tmp_path, cluster)
    try:
        run.wait_for_progress()
        run.driver.terminate()
        assert run.driver.wait(60) == 0, run.output
    finally:
        run.driver.kill()
        run.driver.wait()
    assert "drained" in run.output and not _processes_with(run.paths.root)
    assert list(run.paths.checkpoints.glob("step_*")), "the trainer has saved what it had"


def _processes_with(root: Path) -> list[int]:
    """Living processes whose command line names the run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if str(root).encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found
