"""A keyed run on a real Slurm: lost nodes, requeued jobs, a pool that grows and shrinks, and a clean end.

Where Prometheus is installed, it scrapes one of the runs, and an alert fires for each lost node and clears.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import yaml

from areal_like.paths import RunPaths
from tests.cluster.prometheus import Prometheus, running_prometheus
from tests.cluster.slurm import MISSING, Lab, running_slurm
from tests.support.keys import new_keys
from tests.support.launching import num_steps_done
from tests.support.reward_models import write_scored_task
from tests.support.waiting import is_alive

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING), reason=f"{MISSING} is not installed (tests/cluster/slurm_lab.sh install)"
    ),
    pytest.mark.skipif(os.getuid() != 0, reason="the lab needs root"),
]
JOB = {
    "model": {"path": "tiny", "warm_start_steps": 0},
    "task": {"_target_": "tests.support.rollout_tasks.SlowChecksum"},
    "sampling": {"group_size": 4, "max_new_tokens": 6},
    # Rewards take 0.03 s: a server makes half a step a second, without load.
    "trainer": {"groups_per_step": 16, "checkpoint_interval": 10, "num_steps": 150},
    "buffer": {"lease_timeout_s": 5},
    "rollout": {"max_running": 8, "queue_samples": 4},
    "daemon": {"drain_timeout_s": 20, "linger_s": 20},
    "security": {"keys": "keys"},
    "metrics": {"sd_path": "deploy/prometheus/targets"},
}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with running_slurm() as lab:
        new_keys(lab.directory / "keys")
        (lab.directory / "job.yaml").write_text(yaml.safe_dump(JOB))
        (lab.directory / "deploy" / "prometheus" / "targets").mkdir(parents=True)
        yield lab


@pytest.fixture
def prometheus(lab: Lab) -> Iterator[Prometheus | None]:
    """Scrapes the lab's runs; None where it is not installed."""
    with running_prometheus(lab.directory) if shutil.which("prometheus") else contextlib.nullcontext() as one:
        yield one


class Run:
    """A run in the lab."""

    def __init__(self, lab: Lab, name: str, *words: str) -> None:
        self.lab, self.name = lab, name
        self.paths = RunPaths(lab.directory / "runs" / name)
        lab.areal_like("submit", "--slurm", "--config", "job.yaml", f"name={name}", *words)

    @property
    def num_steps(self) -> int:
        return num_steps_done(self.paths.root)

    def wait_for_progress(self, number: int = 3) -> None:
        """Waits for more steps in metrics.jsonl; steps that are trained again count too."""
        before = self.num_steps
        self.lab.wait(lambda: self.num_steps >= before + number, f"{number} more steps after {before}")

    def node_of(self, role: str) -> str:
        return self.lab.jobs(self.name)[role][0]["node"]

    def wait_for_restart(self, role: str, job_id: str, number: int = 1) -> None:
        def is_restarted() -> bool:
            jobs = [job for job in self.lab.jobs(self.name)[role] if job["id"] == job_id]
            return any(job["restarts"] == str(number) and job["state"] == "RUNNING" for job in jobs)

        self.lab.wait(is_restarted, f"the {role} of job {job_id} to be started again")

    def output(self, role: str, job_id: str) -> str:
        return (self.paths.logs / f"slurm-{role}-{job_id}.out").read_text()

    def servers(self) -> set[str]:
        """The rollout servers that serve."""
        daemons = self.lab.status(self.name).get("daemons", [])
        return {one["name"] for one in daemons if one["role"] == "rollout" and one["state"] == "serving"}

    def wait_for_servers(self, accept: Callable[[int], bool], what: str) -> None:
        self.lab.wait(lambda: accept(len(self.servers())), what)

    def ends_clean(self) -> None:
        """The run ends by itself, all allocations are returned, and its books are right."""
        self.lab.wait(lambda: self.lab.is_free, "the end of all jobs", timeout_s=500)
        assert json.loads(self.paths.summary.read_text())["finished"]
        self.lab.areal_like("audit", str(self.paths.root))  # its exit code is 1 where files contradict
        assert not list(self.paths.endpoints.glob("*.json"))


def test_a_run_survives_lost_nodes_and_scales(lab: Lab, prometheus: Prometheus | None) -> None:
    run = Run(lab, "killed", "--rollout-jobs", "2")
    run.wait_for_progress(5)
    run.wait_for_servers(lambda number: number == 2, "two servers")
    if prometheus is not None:
        for role, number in (("buffer", 1), ("trainer", 1), ("rollout", 2), ("engine", 2)):
            prometheus.wait(
                f'count(up{{run="killed", role="{role}"}} == 1) == {number}', is_empty=False, seconds=20
            )

    for role in ("buffer", "trainer"):
        job, node = lab.jobs("killed")[role][0], run.node_of(role)
        lab.lose(node, with_processes=True)
        down = f'ALERTS{{alertname="ArealDaemonDown", alertstate="firing", role="{role}"}}'
        if prometheus is not None:
            prometheus.wait(down, is_empty=False, seconds=20)
        run.wait_for_restart(role, job["id"])
        assert run.node_of(role) != node
        run.wait_for_progress()
        lab.bring_back(node)
        if prometheus is not None:
            prometheus.wait(down, is_empty=True, seconds=30)
        if role == "buffer":
            log = (run.paths.logs / "trainer-0.log").read_text()
            assert "restarted at tcp://" in log and log.count(" started, pid") <= 1

    lab.areal_like("scale", "killed", "4")
    run.wait_for_servers(lambda number: number == 4, "four servers")
    if prometheus is not None:
        prometheus.wait('count(up{run="killed", role="rollout"} == 1) == 4', is_empty=False, seconds=20)
    run.wait_for_progress()
    lab.areal_like("scale", "killed", "2")
    assert len(lab.jobs("killed")["rollout"]) == 2
    run.wait_for_servers(lambda number: number == 2, "two servers again")
    run.ends_clean()
    if prometheus is not None:
        prometheus.wait('up{run="killed"}', is_empty=True, seconds=30)
        # Those of severity info look half an hour back.
        pages = 'ALERTS{run="killed", alertstate="firing", severity="page"}'
        prometheus.wait(pages, is_empty=True, seconds=30)


def test_processes_on_a_lost_node_do_no_harm(lab: Lab) -> None:
    """Slurm declares nodes down whose processes go on: each role is then there twice."""
    run = Run(lab, "alive", "--rollout-jobs", "2")
    run.wait_for_progress(5)
    run.wait_for_servers(lambda number: number == 2, "two servers")
    trainer, rollout, buffer = (lab.jobs("alive")[role][0] for role in ("trainer", "rollout", "buffer"))

    left = lab.lose(trainer["node"], with_processes=False)
    run.wait_for_restart("trainer", trainer["id"])
    lab.wait(lambda: not any(map(is_alive, left)), "the end of the fenced trainer and its script")
    assert "ended or restarted this job already" in run.output("trainer", trainer["id"])
    run.wait_for_progress()
    assert lab.jobs("alive")["trainer"][0]["restarts"] == "1", "the old script did not requeue the new job"
    lab.bring_back(trainer["node"])

    left = lab.lose(rollout["node"], with_processes=False)
    run.wait_for_restart("rollout", rollout["id"])
    run.wait_for_servers(lambda number: number == 3, "the old server and its successor")
    assert any(map(is_alive, left))

    left = lab.lose(buffer["node"], with_processes=False)
    run.wait_for_restart("buffer", buffer["id"])
    lab.wait(lambda: "another buffer has" in run.output("buffer", buffer["id"]), "the new buffer to wait")
    run.wait_for_progress()
    assert any(map(is_alive, left)), "the old buffer serves the run to its end"
    run.ends_clean()
    lab.wait(lambda: not any(map(is_alive, left)), "the end of the old buffer")


def test_a_time_limit_drains_and_a_requeue_continues(lab: Lab) -> None:
    # A minute less the 50 s of `--signal`: each start of the trainer drains after some seconds.
    words = ("trainer.num_steps=30", "--trainer-args=--time=1")
    run = Run(lab, "limit", "--rollout-jobs", "2", *words)
    job = lab.jobs("limit")["trainer"][0]
    run.ends_clean()
    assert "drained before the time limit; requeued" in run.output("trainer", job["id"])


def test_a_cancelled_run_drains_and_is_submitted_again(lab: Lab) -> None:
    run = Run(lab, "again", "--rollout-jobs", "1", "trainer.num_steps=40")
    run.wait_for_progress(5)
    lab.areal_like("submit", "--slurm", "name=again", code=2)
    for role in ("trainer", "rollout", "buffer"):
        jobs = [job["id"] for job in lab.jobs("again")[role]]
        lab.command("scancel", "--signal=TERM", "--batch", *jobs) if role == "trainer" else None
        lab.command("scancel", *jobs) if role != "trainer" else None
        lab.wait(lambda: not lab.jobs("again")[role], f"the end of the {role}")  # noqa: B023
    assert lab.is_free
    trained = max(json.loads(line)["step"] for line in run.paths.metrics.read_text().splitlines())
    lab.areal_like("submit", "--slurm", "name=again")
    run.ends_clean()
    steps = [json.loads(line)["step"] for line in run.paths.metrics.read_text().splitlines()]
    assert steps.count(trained) == 1, "the drained trainer had written a checkpoint"


def test_a_trainer_on_two_nodes(lab: Lab) -> None:
    words = ("trainer.world_size=2", "--trainer-nodes", "2", "trainer.num_steps=60")
    run = Run(lab, "wide", "--rollout-jobs", "2", *words)
    run.wait_for_progress(5)
    job = lab.jobs("wide")["trainer"][0]
    endpoint = json.loads((run.paths.endpoints / "trainer-1.json").read_text())
    os.kill(endpoint["pid"], 9)
    run.wait_for_restart("trainer", job["id"])
    run.wait_for_progress()
    lab.command("scancel", "--signal=USR2", "--batch", job["id"])
    run.wait_for_restart("trainer", job["id"], 2)
    assert "drained before the time limit" in run.output("trainer", job["id"])
    run.ends_clean()


def test_score_servers_and_routers_are_jobs(lab: Lab) -> None:
    """A reward model's only server is lost with its node: rewards wait for the job's next start."""
    words = [*write_scored_task(lab.directory), "sessions.num_routers=1", "trainer.num_steps=100"]
    run = Run(lab, "scored", "--rollout-jobs", "1", *words)
    run.wait_for_progress()
    scorer, router = lab.jobs("scored")["scorer"][0], lab.jobs("scored")["router"][0]
    for role, job in (("scorer", scorer), ("router", router)):
        assert (run.paths.endpoints / f"{role}-j{job['id']}.json").exists()
    lab.lose(scorer["node"], with_processes=True)
    run.wait_for_restart("scorer", scorer["id"])
    run.wait_for_progress()
    lab.bring_back(scorer["node"])
    run.ends_clean()
    summary = json.loads(run.paths.summary.read_text())
    assert not summary["selection"].get("failures"), "no sample was lost with the score server"


def test_a_wrong_setting_ends_the_run(lab: Lab) -> None:
    """The trainer ends with exit code 2, and the other jobs return their allocations."""
    run = Run(lab, "wrong", "trainer.num_steps=9", "model.path=/no/such/model")
    lab.wait(lambda: lab.is_free, "the end of all jobs", timeout_s=120)
    outputs = [path.read_text() for path in run.paths.logs.glob("slurm-trainer-*.out")]
    assert "no config.json there" in outputs[0] and "ends too" in outputs[0]
