"""Sandboxes that several commands use: files, limits, and what a hostile command leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from areal_like.config.loading import from_mapping
from areal_like.errors import ConfigError, SandboxError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from launch.cli import main
from launch.run_directory.rundir import lock
from rollout_server.sandbox import BwrapSandbox, Limits, OpenSandbox, RlimitsSandbox, Sandbox, make_sandbox
from rollout_server.sandbox.owner import Owner, id_of_run
from rollout_server.sandbox.reaping import own_sandboxes
from tests.rollout_server.sandbox.test_sandbox import (
    SEES_THE_INTERPRETER,
    problem_of_bwrap,
    processes_with,
    wait_until_gone,
)

LIMITS = Limits(timeout_s=600.0, memory_mb=256, max_processes=16, file_mb=4, output_bytes=4096)


@pytest.fixture(params=["bwrap", "rlimits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    if request.param == "bwrap" and (problem := problem_of_bwrap()):
        pytest.skip(problem)
    return make_sandbox(request.param)


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[OpenSandbox]:
    with sandbox.open(limits=LIMITS) as opened:
        yield opened


def test_files_stay_between_commands(box: OpenSandbox) -> None:
    box.write({"src/pkg/a.py": "print('é', 1 + 2)\n", "data.bin": bytes(range(256))})
    ran = box.exec([box.python, "pkg/a.py"], directory="src")
    assert ran.stdout == "é 3\n" and ran.succeeded
    assert box.exec(["sh", "-c", "cat > out; pwd"], stdin=b"\xff\x00").stdout == f"{box.home}\n"
    assert box.read("out") == b"\xff\x00" and box.read("data.bin") == bytes(range(256))
    assert box.read("data.bin", max_bytes=3) == b"\x00\x01\x02"
    box.write({"src/pkg/a.py": "raise SystemExit(4)\n"})
    assert box.exec([box.python, "src/pkg/a.py"]).exit_code == 4


@SEES_THE_INTERPRETER
def test_two_sandboxes_share_nothing(sandbox: Sandbox) -> None:
    with sandbox.open(limits=LIMITS) as first, sandbox.open(limits=LIMITS) as second:
        first.write({"only": "here"})
        assert first.exec(["ls"]).stdout == "only\n" and second.exec(["ls"]).stdout == ""


def test_names_and_kinds_of_files(box: OpenSandbox) -> None:
    """A command decides what a name stands for; reading it ends, and fails only this call."""
    for name in ("", "/etc/passwd", "../x", "a/../../x", "a\0b", "x" * 2000):
        with pytest.raises(ValueError, match="below the sandbox's home"):
            box.read(name)
        with pytest.raises(ValueError, match="below the sandbox's home"):
            box.write({name: ""})
    box.exec(["sh", "-c", "mkdir folder; ln -s /dev/zero endless; ln -s endless2 endless2"])
    for name in ("missing", "folder", "endless2"):
        with pytest.raises(OSError, match=name):
            box.read(name)
    assert box.read("endless", max_bytes=1000) == bytes(1000)
    with pytest.raises(ValueError, match="too long"):
        box.exec(["echo", *["x" * 1000] * 1000])
    with pytest.raises(ValueError, match="null character"):
        box.exec(["echo", "a\0b"])
    assert box.exec(["no-such-program"]).exit_code == 127
    assert box.exec(["true"], directory="missing").exit_code != 0


def test_no_process_of_a_command_meets_the_next(box: OpenSandbox) -> None:
    mark = uuid.uuid4().hex
    daemon = (
        f"'{mark}'; import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    for fd in (0, 1, 2): os.close(fd)\n"
        "    time.sleep(3600)\n"
        "print('started')\n"
    )
    assert box.exec([box.python, "-c", daemon]).stdout == "started\n"
    assert not processes_with(mark)
    assert box.exec(["echo", "next"]).stdout == "next\n"


def test_a_command_at_its_time_limit_ends_alone(box: OpenSandbox) -> None:
    box.write({"kept": "1"})
    for stubborn in ("trap '' TERM; sleep 3600", "exec >&- 2>&-; sleep 3600"):
        result = box.exec(["sh", "-c", stubborn], timeout_s=0.3)
        assert result.timed_out and not result.succeeded
    assert box.read("kept") == b"1"


def test_a_fork_bomb_ends_alone(box: OpenSandbox) -> None:
    bomb = "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(3600)"
    is_root = os.geteuid() == 0  # others meet the limit of their user, and go on
    result = box.exec([box.python, "-I", "-S", "-c", bomb], timeout_s=600.0 if is_root else 2.0)
    assert not result.succeeded
    if is_root:
        assert "more than 16 processes" in result.stderr
    assert box.exec(["echo", "next"]).stdout == "next\n"


def test_a_flood_of_output_is_cut(box: OpenSandbox) -> None:
    for command in ("yes flood", "yes flood >&2", "yes flood & yes flood >&2"):
        result = box.exec(["sh", "-c", command], output_bytes=100)
        assert result.output_was_cut and result.exit_code == 137
        # The first stream that reaches the limit ends the program.
        longest = max(result.stdout, result.stderr, key=len)
        assert longest[:100] == ("flood\n" * 17)[:100] and len(result.stdout_bytes) <= 100
    assert box.exec(["echo", "next"]).stdout == "next\n"


def test_a_full_disk_fails_what_writes() -> None:
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    with BwrapSandbox().open(limits=LIMITS) as box:
        full = box.exec(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do head -c 1000000 /dev/zero > $i; done"])
        assert not full.succeeded and "No space left" in full.stderr
        with pytest.raises(SandboxError, match=r"files cannot be written.*No space left|write error"):
            box.write({"more": bytes(1 << 20)})
        assert box.exec(["echo", "still"]).stdout == "still\n"
        assert box.exec(["sh", "-c", "rm ?"]).succeeded
        box.write({"more": bytes(1 << 20)})


def test_memory_of_all_processes(box: OpenSandbox) -> None:
    program = "import os, time\nfor _ in range(3): os.fork()\nx = os.urandom(120 << 20)\ntime.sleep(3600)"
    many = box.exec([box.python, "-c", program])
    assert many.exit_code == 137 and "more than 512 MiB" in many.stderr
    assert box.exec(["echo", "next"]).stdout == "next\n"


def test_a_closed_sandbox(sandbox: Sandbox) -> None:
    box = sandbox.open(limits=LIMITS)
    box.exec(["true"])
    box.close()
    box.close()
    with pytest.raises(SandboxError, match="the sandbox is closed"):
        box.exec(["true"])


def test_a_sandbox_can_be_closed_during_a_command() -> None:
    """As at the end of an episode whose tool was abandoned at its time limit."""
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    box = BwrapSandbox().open(limits=LIMITS)
    box.exec(["true"])
    mark = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(box.exec, ["sh", "-c", f"sleep 3600; : {mark}"])
        while not processes_with(mark):
            time.sleep(0.01)
        box.close()
        with pytest.raises(SandboxError, match="the sandbox has ended"):
            running.result()
    wait_until_gone(mark)


def test_a_lost_sandbox_is_an_error_of_its_own() -> None:
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    with BwrapSandbox().open(limits=LIMITS) as box:
        box.exec(["true"])
        os.kill(box._program.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(SandboxError, match="the sandbox has ended: exit code -9"):
            box.exec(["true"])
    with BwrapSandbox().open(limits=Limits(lifetime_s=0.05)) as box:
        box._program.process.wait()  # type: ignore[attr-defined]
        with pytest.raises(SandboxError, match=r"lived for lifetime_s=0\.05"):
            box.exec(["true"])
    ends = pytest.raises(SandboxError, match="lived for lifetime_s=1")
    with BwrapSandbox().open(limits=Limits(lifetime_s=1.0)) as box, ends:
        while True:
            assert box.exec(["sleep", "3600"], timeout_s=600.0).exit_code == 137


OPENER = """
import sys, time
from rollout_server.sandbox import Limits, make_sandbox
box = make_sandbox(sys.argv[1]).open(limits=Limits(timeout_s=3600))
box.write({"left": "x"})
print(box.home, flush=True)
box.exec([box.python, "-c", "import time; time.sleep(3600)", sys.argv[2]])
"""


def test_what_a_killed_server_leaves_is_reaped(sandbox: Sandbox, tmp_path: Path) -> None:
    """bwrap leaves nothing; rlimits leaves directories, which have the mark of their owner."""
    run = id_of_run(tmp_path / "sandboxes")
    assert run == id_of_run(tmp_path / "sandboxes")
    mark = uuid.uuid4().hex
    environment = os.environ | {"AREAL_LIKE_SANDBOX_OWNER": f"{run}/rollout-0"}
    command = [sys.executable, "-c", OPENER, sandbox.kind, mark]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        home = Path(server.stdout.readline().strip())
        program = f"-c\0import time; time.sleep(3600)\0{mark}"
        while not any(program in line for line in processes_with(mark)):
            time.sleep(0.01)
        server.kill()
    wait_until_gone(mark)
    if sandbox.kind == "rlimits":
        assert (home / "left").exists()
    assert sandbox.reap(Owner(run=run, server="rollout-1")) == 0
    owners = [Owner(run=run, server="rollout-0"), Owner(run=run)]
    assert [sandbox.reap(owner) for owner in owners] == [sandbox.kind == "rlimits", 0]
    assert sandbox.kind == "bwrap" or not home.exists()


def test_the_owner_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_LIKE_SANDBOX_OWNER", "x/y")
    Owner(run="run", server="rollout-3").adopt()
    program = "from rollout_server.sandbox.owner import Owner; print(Owner.of_this_process())"
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == "Owner(run='run', server='rollout-3')\n"
    monkeypatch.delenv("AREAL_LIKE_SANDBOX_OWNER")
    assert Owner.of_this_process() == Owner(run="none")


@pytest.mark.skipif(bool(problem_of_bwrap()), reason=problem_of_bwrap())
def test_a_command_without_a_second_pipe_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, made = os.pipe, []

    def only_one() -> tuple[int, int]:
        if made:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(pipe())
        return made[0]

    with make_sandbox("bwrap").open(limits=LIMITS) as box:
        assert box.exec(["true"]).exit_code == 0
        open_before = set(Path("/proc/self/fd").iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(os, "pipe", only_one)
            with pytest.raises(OSError, match="too many"):
                box.exec(["true"])
        assert made and set(Path("/proc/self/fd").iterdir()) == open_before
        assert box.exec(["true"]).exit_code == 0


def test_only_some_kinds_serve_over_pipes() -> None:
    class Other(RlimitsSandbox):
        kind = "other"
        start = Sandbox.start

    with pytest.raises(ConfigError, match=r"rewards.sandbox=other: servers of tools on stdio run only in"):
        Other().start(["cat"], limits=Limits(), environment={})


def test_a_server_removes_what_an_earlier_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its own; `areal-like reap` those of all servers, but not while the run is running."""
    monkeypatch.setenv("AREAL_LIKE_SANDBOX_OWNER", "")
    config = from_mapping({"runs_dir": str(tmp_path), "name": "mine", "rewards": {"sandbox": "rlimits"}})
    paths = RunPaths.of(config)
    paths.root.mkdir()
    save_config(config, paths.config)
    homes = []
    for server in ("rollout-0", "rollout-1"):
        asyncio.run(own_sandboxes(config, server=server, paths=paths))
        homes.append(Path(RlimitsSandbox().open().home))
    asyncio.run(own_sandboxes(config, server="rollout-1", paths=paths))
    assert [home.exists() for home in homes] == [True, False]
    held = lock(paths)
    assert main(["reap", str(paths.root)]) == 2
    assert "the run is running" in capsys.readouterr().err
    os.close(held)
    assert main(["reap", str(paths.root)]) == 0
    assert capsys.readouterr().out == "1 sandboxes removed (rlimits)\n"
    assert not any(home.exists() for home in homes)
