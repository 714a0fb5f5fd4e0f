"""The daemon runtime in real processes: HTTP endpoints, drain, watchdog, exit codes, death of the parent."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.runtime.process import PARENT_PID
from tests.support.daemon_process import BODY, DaemonProcess
from tests.support.quick import only_in_chaos


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    daemons: list[DaemonProcess] = []

    def start(mode: str, *settings: str, tied: bool = False) -> DaemonProcess:
        daemons.append(DaemonProcess(tmp_path, mode, *settings, tied=tied))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()


def test_http_endpoints_and_drain(started: Any) -> None:
    daemon = started("serve")
    daemon.wait_ready()
    assert daemon.get("/livez") == (200, "ok")
    status = json.loads(daemon.get("/status")[1])
    assert (status["answer"], status["role"], list(status["waiting_on"])) == (42, "rollout", ["a signal"])
    assert "process_resident_memory_bytes" in daemon.get("/metrics")[1]
    assert daemon.get("/control/double", b'{"n": 4}') == (200, '{"n":8}')
    for verb, body, code in (
        ("double", b"{}", 400),
        ("double", b"[]", 400),
        ("double", b"{", 400),
        ("nope", b"{}", 404),
    ):
        assert daemon.get(f"/control/{verb}", body)[0] == code
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGINT)  # the same Ctrl-C, delivered twice
    assert daemon.process.wait() == 0
    assert not (daemon.run / "endpoints" / "test-0.json").exists()
    assert all(
        json.loads(line)["level"] for line in (daemon.run / "logs" / "test-0.log").read_text().splitlines()
    )


def test_a_drain_that_was_requested_counts_as_no_signal(started: Any) -> None:
    daemon = started("slow")
    daemon.wait_ready()
    assert daemon.get("/control/drain", b"") == (200, '{"draining":true}')
    time.sleep(1.2)
    assert daemon.get("/control/drain", b"") == (200, '{"draining":true}')
    daemon.process.send_signal(signal.SIGTERM)  # as of a launcher that ends a finished run
    (daemon.run / "may end").touch()
    assert daemon.process.wait() == 0


def test_watchdog_ends_a_stuck_drain(started: Any) -> None:
    daemon = started("stuck", "daemon.drain_timeout_s=1")
    daemon.wait_ready()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait() == -signal.SIGALRM


def test_second_signal_ends_the_process_at_once(started: Any) -> None:
    daemon = started("stuck")
    daemon.wait_ready()
    daemon.process.send_signal(signal.SIGTERM)
    while daemon.process.poll() is None:  # a signal within a second of the first one does not count
        time.sleep(0.3)
        daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("user error", 2, "test-0: x is wrong: use y\n"),
        *only_in_chaos(("failure", 1, "test-0: the disk is on fire\n")),
        ("bug", 1, "test-0: unexpected KeyError: 'surprise' (traceback in its log)\n"),
    ],
)
def test_exit_codes_and_single_message(started: Any, mode: str, code: int, message: str) -> None:
    daemon = started(mode)
    _, stderr = daemon.process.communicate()
    assert daemon.process.returncode == code
    assert stderr.endswith(message)
    assert "Traceback" not in stderr


def test_a_log_that_cannot_be_written_is_one_line(started: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "test").mkdir(parents=True)
    (tmp_path / "runs" / "test" / "logs").touch()
    daemon = started("serve")
    _, stderr = daemon.process.communicate()
    assert daemon.process.returncode == 1 and stderr.count("\n") == 1
    assert stderr.startswith("test-0: no log: ") and f"make runs_dir={tmp_path}/runs writable" in stderr


def test_a_late_stop_signal_does_not_change_the_exit_code() -> None:
    body = """
import os, signal, sys
from areal_like.runtime.daemon import exit_code_of
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)
late = Late()  # deleted with this module, after the interpreter has removed its signal handlers
signal.signal(signal.SIGTERM, lambda *_: None)
sys.exit(exit_code_of("test-0", lambda: None))
"""
    assert subprocess.run([sys.executable, "-c", body], check=False).returncode == 0


@pytest.mark.parametrize(
    "failure",
    [
        # Python waits without a limit for a thread that cannot begin.
        """
class NoMemory(threading.Thread):
    def _bootstrap_inner(self):
        raise MemoryError
end_if_threads_fail()
NoMemory(daemon=True).start()
""",
        """
def no_thread():
    raise RuntimeError("can't start new thread")
async def main():
    loop = asyncio.get_running_loop()
    end_if_callbacks_fail(loop)
    loop.call_soon(no_thread)
    await asyncio.sleep(3600)
asyncio.run(main())
""",
    ],
)
def test_a_process_without_memory_ends_at_once(failure: str) -> None:
    imports = """
import asyncio, threading
from areal_like.runtime.exhaustion import end_if_callbacks_fail, end_if_threads_fail
"""
    done = subprocess.run([sys.executable, "-c", imports + failure], capture_output=True, text=True)
    assert done.returncode == 1 and "it gets no more memory, or no more threads" in done.stderr


def test_daemon_of_a_dead_launcher_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BODY, "serve", "name=test", f"runs_dir={tmp_path}/runs"]
    done = subprocess.run(command, env=dict(os.environ) | {PARENT_PID: "1"}, check=False)
    assert done.returncode == 1


def test_daemon_may_open_as_many_files_as_the_system_allows(tmp_path: Path) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        daemon = DaemonProcess(tmp_path, "serve")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    try:
        daemon.endpoint()
        assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0] > 256
    finally:
        daemon.close()
