"""Roles started one by one, as on a cluster: each drains on SIGTERM, and the trainer is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.local_job.child import RUN_MARKER
from tests.support import warm_start
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]


DAEMONS = ("-m buffer", "-m rollout_server ", "-m rollout_server.engine", "-m trainer ")


@pytest.fixture
def start(tmp_path: Path, cache: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `python -m ...` with the run's settings; fails if a process is alive at the end."""
    run = tmp_path / "runs" / "x"
    settings = (
        "name=x",
        f"runs_dir={tmp_path}/runs",
        "model.warm_start_steps=20",
        "trainer.num_steps=100000",
        "eval.num_prompts=0",
        "sampling.group_size=4",
        "trainer.groups_per_step=4",
        "rollout.max_running=16",
        "rollout.queue_samples=8",
        "weights.host=127.0.0.2",
        "weights.integrity=sha256",
    )
    ours = {RUN_MARKER: f"{run}:test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = os.environ | ours | cache
    started: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> subprocess.Popen[bytes]:
        given = {word.partition("=")[0] for word in command}
        others = [setting for setting in settings if setting.partition("=")[0] not in given]
        # A forked server would have torch from the process that it is forked from.
        start_process = subprocess.Popen if command[0] == "rollout_server" else warm_start.Popen
        started.append(
            start_process([sys.executable, "-m", *command, *others], cwd=tmp_path, env=environment)
        )
        return started[-1]

    yield begin
    left = processes_of(run)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()
    assert not left, f"orphans: {left}"


def drain(process: subprocess.Popen[bytes]) -> int:
    """Exit code after SIGTERM. A drain beyond `daemon.drain_timeout_s` ends with the code of a signal."""
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None, what="the end of a drain")
    return process.returncode


@pytest.mark.long
def test_roles_started_by_hand_and_a_replaced_trainer(tmp_path: Path, start: Any) -> None:
    run = tmp_path / "runs" / "x"
    preparing = start("trainer.prepare_model")
    wait_until(lambda: preparing.poll() is not None, what="the model")
    assert preparing.returncode == 0
    buffer = start("buffer")
    endpoint = run / "endpoints" / "buffer.json"
    wait_until(
        lambda: endpoint.exists() and "stream" in endpoint.read_text(),
        what="the buffer",
        run_root=run,
        process=buffer,
    )
    port = json.loads(endpoint.read_text())["stream"].rpartition(":")[2]
    server = start("rollout_server", "--name", "rollout-x", f"buffer.port={port}")

    first = start(
        "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer", f"buffer.port={port}"
    )
    wait_for_steps(3, run, process=first)
    assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text(), (
        "the server has imported torch, which only its engine needs"
    )
    drain(first)  # torchrun's exit code shows only the signal, so the files of its rank are checked
    assert not (run / "endpoints" / "trainer-0.json").exists(), "the rank did not end by itself"
    (checkpoint,) = (run / "checkpoints").iterdir()
    done = num_steps_done(run)
    assert int(checkpoint.name.removeprefix("step_")) == done
    tickets = json.loads((run / "summary.json").read_text())["tickets"]
    assert (tickets["trained"], tickets["leased"]) == (4 * done, 0)

    second = start("trainer", f"buffer.port={port}", "resume=latest")
    wait_for_steps(done + 3, run, process=second)
    assert drain(second) == 0
    assert drain(server) == 0
    assert drain(buffer) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert max(row["lag_max"] for row in rows) <= 4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tickets"]["trained"] == 4 * len(rows) and summary["weights_version"] > 0


@pytest.mark.long
def test_a_finished_fleet_ends_by_itself(tmp_path: Path, start: Any) -> None:
    """No launcher: the buffer tells each role. Signals for logs disturb none of them."""
    run = tmp_path / "runs" / "x"
    (run / "logs").mkdir(parents=True, mode=0o755)  # as the release before made it
    assert start("trainer.prepare_model", "trainer.num_steps=25").wait() == 0
    buffer = start("buffer", "trainer.num_steps=25")
    endpoint = run / "endpoints" / "buffer.json"
    wait_until(
        lambda: endpoint.exists() and "stream" in endpoint.read_text(),
        what="the buffer",
        run_root=run,
        process=buffer,
    )
    port = f"buffer.port={json.loads(endpoint.read_text())['stream'].rpartition(':')[2]}"
    roles = [
        buffer,
        start("rollout_server", "--name", "rollout-0", port, "trainer.num_steps=25"),
        start("rollout_server", "--name", "rollout-1", port, "trainer.num_steps=25"),
        start("trainer", port, "trainer.num_steps=25"),
    ]
    wait_for_steps(2, run, process=roles[-1])
    logs = {path.name for path in (run / "logs").glob("*.log")}
    for name in logs:
        (run / "logs" / name).rename(run / "logs" / f"{name}.1")
    for number in (signal.SIGHUP, signal.SIGUSR1):
        for pid, command in processes_of(run).items():
            if any(daemon in command for daemon in DAEMONS):
                os.kill(pid, number)
        wait_until(lambda: logs == {path.name for path in (run / "logs").glob("*.log")}, what="new logs")
    for process in roles:
        wait_until(lambda process=process: process.poll() is not None, what="its end", run_root=run)
    assert [process.returncode for process in roles] == [0, 0, 0, 0]
    assert num_steps_done(run) == 25 and processes_of(run) == {}
    for name in sorted(logs):
        text = (run / "logs" / name).read_text()
        stacks = "Current thread" if "engine" in name else "thread MainThread"
        assert "SIGHUP" in text and stacks in text, name
    modes = {path: path.stat().st_mode & 0o777 for path in (run, *run.rglob("*"))}
    assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {"0o700"}
    assert {oct(mode) for path, mode in modes.items() if path.is_file()} == {"0o600"}, modes
