"""Eight peers flood the buffer of a job: it goes on, its books are whole, HTTP requests are answered."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.chaos.job import QUIET, ChaosJob, check_counters, check_groups, counters_of, running_job, train
from tests.support.buffer_harness import ROOT

GROUPS_PER_STEP = 8
"""A step takes about ten requests of the trainer, one after the other."""
MAX_GROWTH_BYTES = 192 << 20
"""64 waiting messages of half a megabyte and of 256 KB, and 1000 answers of 60 KB that are not read, with
what the allocator keeps of them."""


class HttpProbe(threading.Thread):
    """Asks /livez and /status in turn, and keeps the times of the answers."""

    def __init__(self, job: ChaosJob) -> None:
        super().__init__(daemon=True)
        self.answers_s: list[float] = []
        self.rss_bytes: list[int] = []
        self._job = job
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.1):
            for path in ("/livez", "/status"):
                asked_s = time.monotonic()
                self._job.buffer.get(path)
                self.answers_s.append(time.monotonic() - asked_s)
            self.rss_bytes.append(self._job.buffer.rss_bytes())

    def finish(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def flooding(job: ChaosJob, *, num_frames: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.chaos.flooder", job.buffer.address, str(num_frames)]
    settings = ["--config", str(job.buffer.paths.config)]
    with subprocess.Popen([*command, *settings], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def flood(directory: Path, *, num_frames: int) -> None:
    trainer = {"num_steps": 1_000_000, "groups_per_step": GROUPS_PER_STEP, "fetch_timeout_s": 600.0}
    buffer = {"max_message_bytes": 1 << 20, "lease_timeout_s": 10.0}
    with running_job(directory, trainer=trainer, buffer=buffer, daemon=QUIET) as job:
        job.produce("rollout-0", sample_s=0.005)
        with job.trainer() as client:
            groups = train(client, first=0, last=10)
            probe = HttpProbe(job)
            before_bytes = job.buffer.rss_bytes()
            started_s, step = time.monotonic(), 10
            steps_s: list[float] = []
            sent: list[dict[str, int]] = []
            # On a slow machine one flood is over before a few steps are: it goes on until they are done.
            while len(steps_s) <= 2 or len(probe.answers_s) <= 10:
                with flooding(job, num_frames=num_frames) as flooder:
                    assert flooder.stdout is not None and flooder.stdout.readline() == "registered\n"
                    if not sent:
                        probe.start()
                    while flooder.poll() is None:
                        begun_s = time.monotonic()
                        groups += train(client, first=step, last=step + 1)
                        steps_s.append(time.monotonic() - begun_s)
                        step += 1
                    sent.append(json.loads(flooder.stdout.read()))
            probe.finish()
            groups += train(client, first=step, last=step + 5, commit_every=1)
            counters = counters_of(client)
        status = job.buffer.status()
        check_groups(groups, job.config, first=0, last=step + 5)
        check_counters(counters)
        assert counters.tickets["trained"] == (step + 5) * GROUPS_PER_STEP
        assert all(all(kinds.values()) for kinds in sent), sent
        assert max(probe.rss_bytes) < before_bytes + MAX_GROWTH_BYTES
        assert status["bad_frames"] > 1000 and status["unregistered_frames"] > 10, status
        assert job.buffer.terminate()[0] == 0
        audit = audit_run(job.buffer.paths.root)
        assert audit.is_clean, "\n".join(audit.lines())
    print(
        f"{sent} in {time.monotonic() - started_s:.0f} s; HTTP: {len(probe.answers_s)} answers, "
        f"median {1000 * statistics.median(probe.answers_s):.0f} ms, longest {max(probe.answers_s):.3f} s; "
        f"{len(steps_s)} steps, median {statistics.median(steps_s):.2f} s, longest {max(steps_s):.2f} s; "
        f"memory {before_bytes >> 20} -> at most "
        f"{max(probe.rss_bytes) >> 20} MB"
    )


@pytest.mark.chaos
def test_eight_flooding_peers_do_not_stop_a_job(tmp_path: Path) -> None:
    """Long, because the buffer reads 150,000 frames while a job goes on."""
    flood(tmp_path, num_frames=150_000)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_million_frames_of_eight_peers(tmp_path: Path) -> None:
    flood(tmp_path, num_frames=1_000_000)
