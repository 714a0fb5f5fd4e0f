"""Containers and remote sandboxes, against programs that follow their documentation: there is no daemon."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox import Limits, OpenSandbox, Sandbox, make_sandbox
from rollout_server.sandbox.owner import Owner
from tests.rollout_server.sandbox.test_sandbox import problem_of_bwrap
from tests.support import fake_container_cli, fake_e2b

MINE = Owner(run="run", server="rollout-0")
LIMITS = Limits(timeout_s=600.0, memory_mb=256, max_processes=16, file_mb=4, output_bytes=4096)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both command lines on PATH, the module `e2b`, and an owner."""
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    source = Path(fake_container_cli.__file__).read_text()
    for name in ("docker", "podman"):
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{source}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "e2b", fake_e2b)
    monkeypatch.setenv("E2B_API_KEY", fake_e2b.service.key)
    monkeypatch.setenv("AREAL_LIKE_SANDBOX_OWNER", "")
    MINE.adopt()
    yield
    for remote in fake_e2b.service.running.values():
        shutil.rmtree(remote.tmp)
    fake_e2b.service.running.clear()


PODMAN = pytest.param("podman:python:test", marks=pytest.mark.long)


@pytest.fixture(params=["docker:python:test", PODMAN, "e2b:python"])
def sandbox(request: pytest.FixtureRequest, fakes: None) -> Sandbox:
    return make_sandbox(request.param)


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[OpenSandbox]:
    with sandbox.open(limits=LIMITS) as opened:
        yield opened


def num_open(sandbox: Sandbox, tmp_path: Path) -> int:
    if sandbox.kind.startswith("e2b"):
        return len(fake_e2b.service.running)
    return len(list((tmp_path / "containers").glob("*/record.json")))


def test_programs_commands_and_files(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.check()
    assert sandbox.run("print(input() + 'é')", stdin="a\n", limits=LIMITS).stdout == "aé\n"
    with sandbox.open(limits=LIMITS) as box:
        box.write({"src/a.py": "import sys; print(1); sys.exit(3)", "data": bytes(range(256))})
        result = box.exec(["python3", "a.py"], directory="src")
        assert (result.stdout, result.exit_code) == ("1\n", 3)
        assert box.exec(["sh", "-c", "cat > out"], stdin=b"\xff\x00").succeeded
        assert box.read("out") == b"\xff\x00" and box.read("data", max_bytes=2) == b"\x00\x01"
        with pytest.raises(OSError, match="missing cannot be read"):
            box.read("missing")
        with pytest.raises(ValueError, match="below the sandbox's home"):
            box.write({"../x": ""})
        assert num_open(sandbox, tmp_path) == 1
    assert num_open(sandbox, tmp_path) == 0
    with pytest.raises(SandboxError, match="closed"):
        box.exec(["true"])


@pytest.mark.long
def test_limits_are_those_of_the_supervisor(box: OpenSandbox) -> None:
    late = box.exec(["sh", "-c", "trap '' TERM; sleep 3600"], timeout_s=0.3)
    assert late.timed_out and late.exit_code == 137
    assert not box.exec(["sh", "-c", "kill -9 $$"]).timed_out
    memory = box.exec(["python3", "-c", "x = bytearray(600 << 20)"])
    assert memory.exit_code == 1 and "MemoryError" in memory.stderr
    many = "import os, time\nfor _ in range(6): os.fork()\ntime.sleep(3600)"
    assert "more than 16 processes" in box.exec(["python3", "-c", many]).stderr
    cut = box.exec(["sh", "-c", "yes | head -c 100000"], output_bytes=100)
    assert cut.output_was_cut and len(cut.stdout_bytes) == 100 and cut.exit_code == 0


@pytest.mark.long
def test_a_flood_of_output_ends_the_command(sandbox: Sandbox, tmp_path: Path) -> None:
    """A container's command line can only be killed, so its container is given up: the sample fails."""
    with sandbox.open(limits=LIMITS) as box:
        if sandbox.kind.startswith("e2b"):
            result = box.exec(["yes"])
            assert result.was_flood and result.exit_code == 137
            assert box.exec(["echo", "next"]).stdout == "next\n"
        else:
            with pytest.raises(SandboxError, match="more output than is read"):
                box.exec(["yes"])
            assert num_open(sandbox, tmp_path) == 0


def test_a_lost_sandbox(sandbox: Sandbox) -> None:
    with sandbox.open(limits=LIMITS) as box:
        assert sandbox.reap(MINE) == 1
        for _ in range(2):
            with pytest.raises(SandboxError, match=r"the container has ended|sandbox is lost"):
                box.exec(["true"])


def test_only_the_owner_is_reaped(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.open(limits=LIMITS), sandbox.open(limits=LIMITS):
        for other in (Owner(run="run", server="rollout-1"), Owner(run="other", server="rollout-0")):
            assert sandbox.reap(other) == sandbox.reap(Owner(run="other")) == 0
        assert num_open(sandbox, tmp_path) == 2
        assert sandbox.reap(Owner(run="run") if sandbox.kind.startswith("e2b") else MINE) == 2
        assert sandbox.reap(MINE) == num_open(sandbox, tmp_path) == 0


OPENER = """
import time
from rollout_server.sandbox import make_sandbox
box = make_sandbox("docker:python:test").open()
print(box._program.process.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("is_cli_killed", [False, True])
def test_a_container_after_its_opener_was_killed(fakes: None, tmp_path: Path, is_cli_killed: bool) -> None:
    """It ends with the stdin of the command line; killed with the command line, it is reaped."""
    sandbox = make_sandbox("docker:python:test")
    with subprocess.Popen([sys.executable, "-c", OPENER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert num_open(sandbox, tmp_path) == 1
        if is_cli_killed:
            os.kill(pid, signal.SIGKILL)
        server.kill()
    if is_cli_killed:
        assert num_open(sandbox, tmp_path) == sandbox.reap(MINE) == 1
    while num_open(sandbox, tmp_path):
        time.sleep(0.01)


def test_what_a_container_is_given(fakes: None, tmp_path: Path) -> None:
    import json

    with make_sandbox("docker:python:test").open(limits=LIMITS):
        (record,) = (tmp_path / "containers").glob("*/record.json")
        given = json.loads(record.read_text())
    assert given["network"] == "none" and given["cap_drop"] == "ALL" and given["read_only"]
    assert given["tmpfs"] == "/tmp:rw,exec,nosuid,nodev,mode=1777,size=4m" and given["shm_size"] == "4m"
    assert given["memory"] == given["memory_swap"] == "516m" and given["pids_limit"] == "24"
    assert given["label"] == ["areal-like.run=run", "areal-like.server=rollout-0"]


def test_what_does_not_work_is_refused(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"No such image: none.*docker pull none"):
        make_sandbox("docker:none").check()
    with pytest.raises(ConfigError, match="template 'none' not found"):
        make_sandbox("e2b:none").check()
    monkeypatch.setenv("E2B_API_KEY", "wrong")
    with pytest.raises(ConfigError, match=r"Invalid API key.*E2B_API_KEY"):
        make_sandbox("e2b").check()
    monkeypatch.setitem(sys.modules, "e2b", None)
    with pytest.raises(ConfigError, match="pip install e2b"):
        make_sandbox("e2b").check()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="podman is not installed"):
        make_sandbox("podman:x").check()
    with pytest.raises(ConfigError, match="servers of tools on stdio run only in bwrap or rlimits"):
        make_sandbox("podman:x").start(["cat"], limits=LIMITS, environment={})


@pytest.mark.clients
def test_the_stand_in_has_the_signatures_of_the_sdk() -> None:
    """Each parameter that the stand-in takes exists in e2b, and each name in the module."""
    sdk = pytest.importorskip("e2b")
    sync = "e2b.sandbox_sync"
    Commands = importlib.import_module(f"{sync}.commands.command").Commands
    CommandHandle = importlib.import_module(f"{sync}.commands.command_handle").CommandHandle
    Filesystem = importlib.import_module(f"{sync}.filesystem.filesystem").Filesystem
    per_request = {"request_timeout"}  # of **opts: ApiParams
    for fake, real in (
        (fake_e2b.Sandbox.create, sdk.Sandbox.create),
        (fake_e2b.Sandbox.list, sdk.Sandbox.list),
        (fake_e2b.Commands.run, Commands.run),
        *((getattr(fake_e2b.Files, name), getattr(Filesystem, name)) for name in ("write", "write_files")),
        *((getattr(fake_e2b.Files, name), getattr(Filesystem, name)) for name in ("read", "make_dir")),
        (fake_e2b.Handle.wait, CommandHandle.wait),
        (fake_e2b.SandboxQuery, sdk.SandboxQuery),
    ):
        missing = set(inspect.signature(fake).parameters) - set(inspect.signature(real).parameters)
        assert missing <= per_request, (fake, missing)
    for name in (
        "SandboxException",
        "AuthenticationException",
        "ServiceBusyException",
        "CommandExitException",
    ):
        assert issubclass(getattr(sdk, name), Exception)
    assert issubclass(sdk.CommandExitException, sdk.SandboxException)
    assert issubclass(sdk.TimeoutException, sdk.SandboxException) and hasattr(CommandHandle, "pid")
