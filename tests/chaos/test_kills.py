"""SIGKILL, SIGSTOP and SIGTERM under load, to the buffer, its producers and its trainer client."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from launch.audit.run import audit_run
from tests.chaos.job import ChaosJob, check_counters, check_groups, counters_of, running_job, train
from tests.support.buffer_harness import ROOT

GROUPS_PER_STEP = 8


def settings(num_steps: int, **buffer: Any) -> dict[str, Any]:
    return {
        "trainer": {"num_steps": num_steps, "groups_per_step": GROUPS_PER_STEP, "fetch_timeout_s": 600.0},
        "buffer": {"lease_timeout_s": 2.0} | buffer,
    }


def check_audit(job: ChaosJob, *, num_steps: int) -> None:
    audit = audit_run(job.buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == num_steps * GROUPS_PER_STEP


class _Training(threading.Thread):
    """Trains in a thread beside the test; `finish` raises its error."""

    def __init__(self, job: ChaosJob, *, num_steps: int) -> None:
        super().__init__(daemon=True)
        self._job, self._num_steps = job, num_steps
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._job.trainer() as client:
                groups = train(client, first=0, last=self._num_steps)
                counters = counters_of(client)
            check_groups(groups, self._job.config, first=0, last=self._num_steps)
            check_counters(counters)
        except BaseException as error:  # of any kind: `finish` raises it in the test
            self._error = error

    def finish(self) -> None:
        self.join()
        assert not self.is_alive(), self._job.buffer.status()
        if self._error is not None:
            raise self._error


def kill_producers(directory: Path, *, num_kills: int, num_steps: int, overdue: str) -> None:
    rng = random.Random(num_kills)
    with running_job(directory, **settings(num_steps, overdue=overdue)) as job:
        names = ["rollout-0", "rollout-1"]
        for name in names:
            job.produce(name, sample_s=0.03)
        training = _Training(job, num_steps=num_steps)
        for _ in range(num_kills):
            time.sleep(0.3 + rng.random())
            victim = rng.choice(names)
            job.producers[victim].send_signal(signal.SIGKILL)
            job.producers[victim].wait()
            job.buffer.wait_status(
                lambda status, name=victim: name not in [peer["name"] for peer in status["peers"]],
            )
            job.produce(victim, sample_s=0.03)
        training.finish()
        assert job.buffer.terminate()[0] == 0
        check_audit(job, num_steps=num_steps)


@pytest.mark.chaos
def test_killed_producers_cost_only_their_leases(tmp_path: Path) -> None:
    """Also those of the late samples of closed groups."""
    kill_producers(tmp_path, num_kills=2, num_steps=40, overdue="close")


@pytest.mark.chaos
def test_twenty_killed_producers(tmp_path: Path) -> None:
    kill_producers(tmp_path, num_kills=20, num_steps=400, overdue="wait")


def kill_buffers(directory: Path, *, num_kills: int, num_steps: int, **buffer: str) -> None:
    rng = random.Random(num_kills)
    with running_job(directory, **settings(num_steps, **buffer)) as job:
        for name in ("rollout-0", "rollout-1"):
            job.produce(name, sample_s=0.01)
        training = _Training(job, num_steps=num_steps)
        for _ in range(num_kills):
            time.sleep(0.5 + 1.5 * rng.random())
            job.restart_buffer()
        training.finish()
        assert job.buffer.terminate()[0] == 0
        check_audit(job, num_steps=num_steps)


def test_producers_and_trainer_survive_a_killed_buffer(tmp_path: Path) -> None:
    kill_buffers(tmp_path, num_kills=2, num_steps=40, durability="process_crash", overdue="wait")


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("durability", "overdue"), [("process_crash", "close"), ("power_loss", "wait")])
def test_twenty_killed_buffers(tmp_path: Path, durability: str, overdue: str) -> None:
    kill_buffers(tmp_path, num_kills=20, num_steps=500, durability=durability, overdue=overdue)


@contextlib.contextmanager
def _killed_at_the_end(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _settled(job: ChaosJob) -> dict[str, int]:
    """Tickets by state, once they have not changed for a second."""
    tickets: dict[str, int] = {}
    while tickets != (tickets := job.buffer.status()["tickets"]) or tickets["leased"] or tickets["queued"]:
        time.sleep(1.0)
    return tickets


def stop_trainer(directory: Path, *, stopped_s: float) -> None:
    num_steps = 60
    with running_job(directory, **settings(num_steps, cache_bytes=1 << 20, overdue="wait")) as job:
        for name in ("rollout-0", "rollout-1"):
            job.produce(name, num_tokens=2048)
        command = [
            sys.executable,
            "-m",
            "tests.chaos.consumer",
            str(num_steps),
            "--config",
            str(job.buffer.paths.config),
        ]
        with _killed_at_the_end(
            [*command, f"buffer.port={job.buffer.address.rpartition(':')[2]}"]
        ) as consumer:
            job.buffer.wait_status(lambda status: status["step"] >= 5)
            consumer.send_signal(signal.SIGSTOP)
            # Producers generate the groups that the staleness bound admits, then wait.
            before, rss_bytes = _settled(job), job.buffer.rss_bytes()
            time.sleep(stopped_s)
            assert job.buffer.rss_bytes() < 1.05 * rss_bytes
            assert job.buffer.status()["tickets"] == before
            consumer.send_signal(signal.SIGCONT)
            lines = consumer.communicate()[0].splitlines()
        assert consumer.returncode == 0 and len(lines) == num_steps
        tickets = [ticket for line in lines for ticket in line.split()[1:]]
        assert len(set(tickets)) == len(tickets) == num_steps * GROUPS_PER_STEP
        assert job.buffer.status()["tickets"]["dropped"] == 0
        assert job.buffer.terminate()[0] == 0
        check_audit(job, num_steps=num_steps)


@pytest.mark.chaos
def test_a_stopped_trainer_stops_the_producers(tmp_path: Path) -> None:
    stop_trainer(tmp_path, stopped_s=3.0)


@pytest.mark.chaos
def test_a_trainer_stopped_for_a_minute(tmp_path: Path) -> None:
    stop_trainer(tmp_path, stopped_s=60.0)


@pytest.mark.long
def test_a_buffer_that_drains_under_load_is_unready_at_once(tmp_path: Path) -> None:
    with running_job(tmp_path, **settings(1000)) as job:
        producers = [job.produce(name) for name in ("rollout-0", "rollout-1")]
        with job.trainer() as link:
            train(link, first=0, last=10)
            # One producer alone can serve those steps; a SIGTERM while the other still starts would kill it.
            names = {"rollout-0", "rollout-1"}
            job.buffer.wait_status(lambda s: names <= {peer["name"] for peer in s["peers"]})
            job.buffer.process.send_signal(signal.SIGTERM)
            with pytest.raises((OSError, HTTPException)):  # 503, or the buffer has ended
                while True:
                    job.buffer.get("/readyz")
        assert job.buffer.process.wait() == 0
        assert audit_run(job.buffer.paths.root).is_clean
        for producer in producers:
            producer.terminate()
            assert producer.wait() == 0
