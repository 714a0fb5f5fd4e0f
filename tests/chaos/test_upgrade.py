"""Two releases in one job, upgraded one role at a time: which orders work, and what is refused.

The next release is a copy of this one, in one test with a higher wire version.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config, save_config
from areal_like.wire.codec import WIRE_VERSION
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
from tests.support.ports import free_port

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.chaos]
PACKAGES = ("areal_like", "buffer", "rollout_server", "trainer", "configs", "launch")


class Fleet:
    """The roles of one job, each started by hand from the source of some release."""

    def __init__(self, directory: Path) -> None:
        self.run = directory / "runs" / "x"
        self._directory = directory
        self._port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, release: Path, role: str, *words: str) -> subprocess.Popen[str]:
        """Starts `python -m ROLE` of a release."""
        process = subprocess.Popen(
            [sys.executable, "-m", role, *words, *self.settings],
            cwd=self._directory,
            env=os.environ
            | {
                RUN_MARKER: f"{self.run}:test",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{release}{os.pathsep}{ROOT}",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    @property
    def settings(self) -> list[str]:
        """What all roles have in common."""
        return [
            "name=x",
            f"runs_dir={self._directory}/runs",
            "model.warm_start_steps=0",
            "task._target_=tests.support.rollout_tasks.Checksum",
            "trainer.num_steps=100000",
            "trainer.checkpoint_interval=10",
            "trainer.buffer_timeout_s=60",
            "eval.num_prompts=0",
            "sampling.group_size=4",
            "trainer.groups_per_step=4",
            "rollout.max_running=16",
            "rollout.queue_samples=8",
            f"buffer.port={self._port}",
            "daemon.exit_code_on_drain=75",
        ]

    def drain(self, process: subprocess.Popen[str]) -> None:
        """SIGTERM, and the end of a drain."""
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, what="the end of a drain", run_root=self.run)
        assert process.returncode == 75, self.refusal(process)

    def more_steps(self, process: subprocess.Popen[str], num_steps: int = 8) -> None:
        """Waits until the trainer has done more steps."""
        wanted = num_steps_done(self.run) + num_steps
        wait_until(
            lambda: num_steps_done(self.run) > wanted, what="more steps", run_root=self.run, process=process
        )

    def refusal(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and stderr of a role that ends by itself."""
        wait_until(lambda: process.poll() is not None, what="the end of a refused role", run_root=self.run)
        assert process.stderr is not None
        return process.returncode, process.stderr.read()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet whose processes are killed at the end."""
    found = Fleet(tmp_path)
    assert found.start(ROOT, "trainer.prepare_model").wait() == 0
    save_config(load_config(found.settings), RunPaths(found.run).config)  # for the audit
    yield found
    for pid in processes_of(found.run):
        os.kill(pid, signal.SIGKILL)
    for process in found.started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def next_release(directory: Path, *, raises_wire: bool) -> Path:
    """A copy of the product , to be run in its place."""
    target = directory / "next"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    if raises_wire:
        codec = target / "areal_like" / "wire" / "codec.py"
        changed = re.sub(
            r"^WIRE_VERSION = \d+$", f"WIRE_VERSION = {WIRE_VERSION + 1}", codec.read_text(), flags=re.M
        )
        assert changed != codec.read_text()
        codec.write_text(changed)
    return target


@pytest.mark.parametrize("order", ["server buffer trainer", "trainer buffer server", "buffer trainer server"])
def test_roles_of_one_wire_version_are_upgraded_in_any_order(
    tmp_path: Path, fleet: Fleet, order: str
) -> None:
    new = next_release(tmp_path, raises_wire=False)
    roles = {
        "buffer": fleet.start(ROOT, "buffer"),
        "server": fleet.start(ROOT, "rollout_server", "--name", "rollout-0"),
        "trainer": fleet.start(ROOT, "trainer"),
    }
    wait_for_steps(5, fleet.run)
    for role in order.split():
        fleet.drain(roles[role])
        words = {"buffer": (), "server": ("--name", "rollout-0"), "trainer": ("resume=latest",)}[role]
        roles[role] = fleet.start(new, {"server": "rollout_server"}.get(role, role), *words)
        fleet.more_steps(roles["trainer"])
    commands = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes_of(fleet.run)]
    assert commands and all(str(new).encode() in environ for environ in commands), (
        "all are of the new release"
    )
    for role in ("trainer", "server", "buffer"):
        fleet.drain(roles[role])
    audit = audit_run(fleet.run)
    assert audit.is_clean, "\n".join(audit.lines())
    rows = [json.loads(line) for line in (fleet.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))), "no step was done twice or left out"


def test_another_wire_version_is_refused_and_harms_nobody(tmp_path: Path, fleet: Fleet) -> None:
    new = next_release(tmp_path, raises_wire=True)
    buffer = fleet.start(ROOT, "buffer")
    server = fleet.start(ROOT, "rollout_server", "--name", "rollout-0")
    trainer = fleet.start(ROOT, "trainer")
    wait_for_steps(5, fleet.run)

    late = fleet.start(new, "rollout_server", "--name", "rollout-1")
    code, err = fleet.refusal(late)
    versions = f"uses wire version {WIRE_VERSION} and this side {WIRE_VERSION + 1}"
    assert code == 1 and versions in err, (code, err)
    fleet.more_steps(trainer)

    fleet.drain(trainer)
    code, err = fleet.refusal(fleet.start(new, "trainer", "resume=latest"))
    assert code == 1 and versions in err, (code, err)
    trainer = fleet.start(ROOT, "trainer", "resume=latest")
    fleet.more_steps(trainer)

    # All at once works: nothing is lost that was acknowledged.
    for process in (trainer, server, buffer):
        fleet.drain(process)
    before = num_steps_done(fleet.run)
    buffer = fleet.start(new, "buffer")
    code, err = fleet.refusal(fleet.start(ROOT, "rollout_server", "--name", "rollout-0"))
    assert code == 1 and f"uses wire version {WIRE_VERSION + 1} and this side {WIRE_VERSION}" in err, (
        code,
        err,
    )
    server = fleet.start(new, "rollout_server", "--name", "rollout-0")
    trainer = fleet.start(new, "trainer", "resume=latest")
    fleet.more_steps(trainer)
    for process in (trainer, server, buffer):
        fleet.drain(process)
    audit = audit_run(fleet.run)
    assert audit.is_clean, "\n".join(audit.lines())
    rows = [json.loads(line) for line in (fleet.run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) > before and [row["step"] for row in rows] == list(range(len(rows)))
