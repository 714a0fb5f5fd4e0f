"""Roles started one by one, as on a cluster: each drains on SIGTERM, and the trainer is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import (
    TEST_LIMIT_S,
    num_steps_done,
    processes_of,
    wait_for_steps,
    wait_until,
)
from tests.support.roles import Roles, started_roles

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]


DAEMONS = ("-m buffer", "-m rollout_server ", "-m rollout_server.engine", "-m trainer ")
SETTINGS = (
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


@pytest.fixture
def roles(tmp_path: Path, cache: dict[str, str]) -> Iterator[Roles]:
    with started_roles(tmp_path, SETTINGS, cache) as roles:
        yield roles


def drain(process: subprocess.Popen[bytes]) -> int:
    """Exit code after SIGTERM. A drain beyond `daemon.drain_timeout_s` ends with the code of a signal."""
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: process.poll() is not None, what="the end of a drain")
    return process.returncode


@pytest.mark.chaos
def test_roles_started_by_hand_and_a_replaced_trainer(roles: Roles) -> None:
    run = roles.run
    buffer, port = roles.start_buffer()
    server = roles.start("rollout_server", "--name", "rollout-x", port)

    first = roles.start("torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "trainer", port)
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

    second = roles.start("trainer", port, "resume=latest")
    wait_for_steps(done + 3, run, process=second)
    assert drain(second) == 0
    assert drain(server) == 0
    assert drain(buffer) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert max(row["lag_max"] for row in rows) <= 4
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tickets"]["trained"] == 4 * len(rows) and summary["weights_version"] > 0


@pytest.mark.chaos
def test_a_finished_fleet_ends_by_itself(roles: Roles) -> None:
    """No launcher: the buffer tells each role. Signals for logs disturb none of them."""
    run, short = roles.run, "trainer.num_steps=25"
    (run / "logs").mkdir(parents=True, mode=0o755)  # as the release before made it
    buffer, port = roles.start_buffer(short)
    processes = [
        buffer,
        roles.start("rollout_server", "--name", "rollout-0", port, short),
        roles.start("rollout_server", "--name", "rollout-1", port, short),
        roles.start("trainer", port, short),
    ]
    wait_for_steps(2, run, process=processes[-1])
    for name in ("rollout-0-engine.log", "rollout-1-engine.log"):  # one alone may have made these steps
        log = run / "logs" / name
        wait_until(lambda log=log: "ready on port" in log.read_text(), what="its engine", run_root=run)
    logs = {path.name for path in (run / "logs").glob("*.log")}
    for name in logs:
        (run / "logs" / name).rename(run / "logs" / f"{name}.1")
    for number in (signal.SIGHUP, signal.SIGUSR1):
        for pid, command in processes_of(run).items():
            if any(daemon in command for daemon in DAEMONS):
                os.kill(pid, number)
        wait_until(lambda: logs == {path.name for path in (run / "logs").glob("*.log")}, what="new logs")
    for process in processes:
        wait_until(lambda process=process: process.poll() is not None, what="its end", run_root=run)
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert num_steps_done(run) == 25 and processes_of(run) == {}
    for name in sorted(logs):
        text = (run / "logs" / name).read_text()
        stacks = "Current thread" if "engine" in name else "thread MainThread"
        assert "SIGHUP" in text and stacks in text, name
    modes = {path: path.stat().st_mode & 0o777 for path in (run, *run.rglob("*"))}
    assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {"0o700"}
    assert {oct(mode) for path, mode in modes.items() if path.is_file()} == {"0o600"}, modes
