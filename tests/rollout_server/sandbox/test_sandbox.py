"""Hostile programs, in both sandboxes: what they may not do, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from rollout_server.sandbox import BwrapSandbox, Limits, RlimitsSandbox, Sandbox, make_sandbox, supervisor
from rollout_server.sandbox import bwrap as module
from rollout_server.sandbox.supervisor import _CALLS

SEES_THE_INTERPRETER = pytest.mark.skipif(
    Path(sys.prefix).is_relative_to("/tmp"),
    reason="Python lies in /tmp, where programs in the sandbox have their files: they see its folder there",
)


def problem_of_bwrap() -> str:
    try:
        BwrapSandbox().check()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(params=["bwrap", "rlimits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    if request.param == "bwrap" and (problem := problem_of_bwrap()):
        pytest.skip(problem)
    return make_sandbox(request.param)


@pytest.fixture
def bwrap() -> Sandbox:
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    return make_sandbox("bwrap")


def processes_with(mark: str) -> list[str]:
    """Their command lines. Those of other programs may contain anything."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            command = path.read_text(errors="replace")
            if mark in command:
                found.append(command)
    return found


def wait_until_gone(mark: str) -> None:
    """Until no process has `mark` in its command line; none of them ends by itself in the time of a test."""
    while processes_with(mark):
        time.sleep(0.01)


def test_a_program_and_its_output(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys; print(input()[::-1]); print('é', file=sys.stderr)", stdin="abc\n")
    assert (result.stdout, result.stderr, result.exit_code) == ("cba\n", "é\n", 0)
    assert result.succeeded and not result.timed_out and not result.output_was_cut


def test_commands_and_exit_codes(sandbox: Sandbox) -> None:
    assert sandbox.run(["sh", "-c", "echo $HOME; exit 3"]).exit_code == 3
    assert sandbox.run(["sh", "-c", "kill -9 $$"]).exit_code == 137
    missing = sandbox.run(["no-such-program"])
    assert missing.exit_code == 127 and "no-such-program" in missing.stderr
    failed = sandbox.run("raise LookupError('here')")
    assert failed.exit_code == 1 and failed.stderr.endswith("LookupError: here\n")


def test_environment_is_scrubbed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    result = sandbox.run("import os; print(os.environ)")
    assert result.succeeded and "secret" not in result.stdout and "LD_PRELOAD" not in result.stdout


def test_sleep_past_the_limit(sandbox: Sandbox) -> None:
    mark = uuid.uuid4().hex
    program = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); '{mark}'"
    command = [sys.executable, "-u", "-c", f"{program}; time.sleep(3600)"]
    for timeout_s in (1.0, 10.0, 100.0):  # a busy machine starts it late
        result = sandbox.run(command, limits=Limits(timeout_s=timeout_s))
        assert result.timed_out and not result.succeeded
        if result.stdout == "1\n":
            break
    assert result.stdout == "1\n"  # what it wrote before
    wait_until_gone(mark)


def test_daemons_are_killed(sandbox: Sandbox) -> None:
    """A daemon that has left its group and session, and whose parents have ended, ends with its program."""
    mark = uuid.uuid4().hex
    daemon = (
        f"'{mark}'; import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        for fd in (0, 1, 2): os.close(fd)\n"
        "        time.sleep(3600)\n"
        "    os._exit(0)\n"
        "time.sleep(0.1)\n"
        "print('started')\n"
    )
    result = sandbox.run([sys.executable, "-c", daemon], limits=Limits(timeout_s=600))
    assert result.stdout == "started\n"
    wait_until_gone(mark)


def test_only_descendants_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of other threads and grandchildren, too; a process that has ended is none."""
    if not supervisor._lists_children():
        pytest.skip("this kernel lists no children")
    # A shell gives what it starts with & an empty input of its own, with which these would end at once.
    waiting = f"{sys.executable} -c 'import sys; sys.stdin.read()' <&3"
    grandchildren = f"exec 3<&0; {waiting} & {waiting} & wait"
    begun: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        begun.append(subprocess.Popen(["sh", "-c", f"cat | ({grandchildren})"], stdin=subprocess.PIPE))

    others = supervisor.listed_descendants(os.getpid()).keys()
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    try:
        while len((listed := supervisor.listed_descendants(os.getpid())).keys() - others) < 2 * 5:
            time.sleep(0.01)
        assert listed.keys() == supervisor.descendants(os.getpid()).keys() and ended.pid not in listed
        monkeypatch.setattr(supervisor, "_processes", None)
        assert supervisor.listed_descendants(os.getpid()).keys() == listed.keys()
        assert all(num_threads >= 1 and resident >= 0 for num_threads, resident in listed.values())
    finally:
        for process in begun:
            process.communicate(b"")
        ended.wait()


def test_fork_bomb(sandbox: Sandbox) -> None:
    mark = uuid.uuid4().hex
    bomb = f"'{mark}'; import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(3600)"
    # Without root, programs meet the limit of their user, and go on.
    limits = Limits(timeout_s=600 if os.geteuid() == 0 else 2)
    result = sandbox.run([sys.executable, "-I", "-S", "-c", bomb], limits=limits)
    assert not result.succeeded
    if os.geteuid() == 0:  # RLIMIT_NPROC does not bind root: they are counted
        assert "more than 32 processes" in result.stderr
    wait_until_gone(mark)


def test_the_supervisor_runs_before_the_program(sandbox: Sandbox) -> None:
    """Thousands of processes that fork would leave an ordinary process no time to count them."""
    program = (
        "import os\n"
        "print(os.sched_getscheduler(0) == os.SCHED_OTHER)\n"
        "print(os.sched_getscheduler(os.getppid()) == os.SCHED_FIFO)\n"
        "try: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\n"
        "except PermissionError: print('refused')\n"
    )
    result = sandbox.run(program)
    assert result.stdout.splitlines() == ["True", str(may_have_priority()), "refused"]


def may_have_priority() -> bool:
    """True if this user may give a process a real-time priority."""
    text = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    tried = subprocess.run([sys.executable, "-c", text], stderr=subprocess.DEVNULL, check=False)
    return tried.returncode == 0


def test_memory_of_one_and_of_many_processes(sandbox: Sandbox) -> None:
    limits = Limits(memory_mb=100, timeout_s=600)
    one = sandbox.run("x = bytearray(200 << 20)", limits=limits)
    assert one.exit_code == 1 and "MemoryError" in one.stderr
    program = (
        "import os, time\nfor _ in range(4): os.fork()\nx = os.urandom(50 << 20)\nprint(1)\ntime.sleep(3600)"
    )
    many = sandbox.run(program, limits=limits)
    assert many.exit_code == 137 and "more than 200 MiB" in many.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_cut(sandbox: Sandbox, stream: str) -> None:
    result = sandbox.run(
        f"import sys\nwhile True: sys.{stream}.write('x' * 65536)",
        limits=Limits(output_bytes=1000, timeout_s=600),
    )
    assert result.output_was_cut and result.exit_code == 137
    assert getattr(result, stream)[:1000] == "x" * 1000


def test_large_files(sandbox: Sandbox) -> None:
    program = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with open('file', 'wb') as f:\n"
        "    for _ in range(1024): f.write(bytes(1 << 20))"
    )
    result = sandbox.run(program, limits=Limits(file_mb=4))
    assert result.exit_code == 1 and "OSError" in result.stderr


def test_cpu_time_is_limited(sandbox: Sandbox) -> None:
    result = sandbox.run("while True: pass", limits=Limits(timeout_s=0.3))
    assert result.timed_out


def test_programs_with_odd_text(sandbox: Sandbox) -> None:
    assert not sandbox.run("print('\x00')").succeeded  # a syntax error, and no exception here
    assert not sandbox.run("\ud800").succeeded
    long = "x = 1\n" * 100_000  # longer than one argument of a command may be
    assert sandbox.run(long, limits=Limits(timeout_s=600)).succeeded


def test_bwrap_shows_no_files_of_the_job(bwrap: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("secret")
    program = "import os, sys\n" + "\n".join(
        f"try: print(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read())\n"
        "except OSError as error: print(type(error).__name__)"
        for path in (
            str(tmp_path / "ledger"),
            str(Path.cwd() / "pyproject.toml"),
            "/etc/passwd",
            "/root/.ssh",
        )
    )
    result = bwrap.run(program)
    assert result.stdout.split() == ["FileNotFoundError"] * 4, result


def test_bwrap_hides_a_working_directory_that_it_shows(
    bwrap: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that runs below the interpreter's prefix, as in images of Python with /usr/src/app."""
    (tmp_path / "app").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "app" / "ledger").write_text("secret")
    monkeypatch.chdir(tmp_path / "app")
    monkeypatch.setattr(module, "_SYSTEM", (*module._SYSTEM, str(tmp_path)))
    module._system_files.cache_clear()
    try:
        shown = [str(tmp_path), str(tmp_path / "app")]
        result = bwrap.run(f"import json, os; print(json.dumps([sorted(os.listdir(p)) for p in {shown}]))")
    finally:
        module._system_files.cache_clear()
    assert json.loads(result.stdout) == [["app", "lib"], []]


def test_bwrap_has_no_network_and_no_other_processes(bwrap: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = bwrap.run(
            "import os, socket\n"
            "print([pid for pid in os.listdir('/proc') if pid.isdigit() and int(pid) > 9])\n"
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)"
        )
    assert result.stdout == "[]\n"
    assert "ConnectionRefusedError" in result.stderr or "Network is unreachable" in result.stderr


def test_what_escapes_the_limits_is_refused(sandbox: Sandbox) -> None:
    # Signal 0 and a namespace of its own change nothing outside, also where this fails.
    program = """
import ctypes, errno, os, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()
calls = {
    "memfd_create": lambda: libc.memfd_create(b"x", 0),
    "shmget": lambda: libc.shmget(0, 4096, 0o1600),
    "unshare": lambda: libc.unshare(0x10000000),
    "kill": lambda: libc.kill(parent, 0),
    "kill all": lambda: libc.kill(-1, 0),
    "prlimit": lambda: libc.prlimit(parent, 0, None, None),
    "ptrace": lambda: libc.ptrace(16, 1, 0, 0),
    "process_vm_writev": lambda: libc.process_vm_writev(1, None, 0, None, 0, 0),
    "add_key": lambda: libc.syscall(KEYS[0], b"user", b"x", b"y", 1, -3),
    "request_key": lambda: libc.syscall(KEYS[1], b"user", b"x", None, 0),
    "keyctl": lambda: libc.syscall(KEYS[2], 0, -3, 0),
}
for name, call in calls.items():
    print(name, call(), errno.errorcode[ctypes.get_errno()])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))])
thread = threading.Thread(target=os.kill, args=(os.getpid(), 0))
thread.start()
thread.join()
print(subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, text=True, check=True).stdout)
"""
    numbers = _CALLS[os.uname().machine][1]
    keys = [numbers[name] for name in ("add_key", "request_key", "keyctl")]
    result = sandbox.run(f"KEYS = {keys}\n{program}")
    *refused, capabilities, one, _ = result.stdout.splitlines()
    assert len(refused) == 11 and all(line.endswith(" -1 EPERM") for line in refused), result
    assert set(eval(capabilities)) == {"0" * 16} and one == "1", result


def test_only_common_sockets_can_be_opened(sandbox: Sandbox) -> None:
    program = """
import errno, socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16, 17, 38, 40):
    try:
        socket.socket(family, socket.SOCK_STREAM if family < 16 else socket.SOCK_RAW).close()
        print(family.name)
    except OSError as error:
        print(errno.errorcode[error.errno])
print(len(socket.socketpair()))
"""
    lines = sandbox.run(program).stdout.split()
    assert lines == ["AF_UNIX", "AF_INET", "AF_INET6", *["EAFNOSUPPORT"] * 4, "2"]


def test_the_input_is_no_memory_of_the_program(sandbox: Sandbox) -> None:
    program = """
import fcntl, os, sys
for change in (lambda: os.open("/proc/self/fd/0", os.O_RDWR), lambda: 0):
    try:
        descriptor = change()
        os.write(descriptor, b"x" * 4096)
        print("written")
    except OSError as error:
        print(type(error).__name__)
try:
    os.ftruncate(0, 1 << 20)
    print("grown")
except OSError as error:
    print(type(error).__name__)
print(sys.stdin.read())
"""
    assert sandbox.run(program, stdin="input").stdout.split() == [*["PermissionError"] * 3, "input"]


def test_each_program_leaves_the_session_keyring() -> None:
    """It must not find what the server or another program has put there, also on a kernel without filters."""
    keyctl = _CALLS[os.uname().machine][1]["keyctl"]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
from rollout_server.sandbox import supervisor
before = libc.syscall({keyctl}, 0, -3, 0)
supervisor.leave_keyring()
print(before != libc.syscall({keyctl}, 0, -3, 0))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_bwrap_shows_no_kernel_setting_to_change(bwrap: Sandbox) -> None:
    # Opens and writes nothing: where this fails, a program of root would change the machine.
    program = """
import os
def opens(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True
paths = [os.path.join(folder, name) for folder, _, names in os.walk("/proc/sys") for name in names]
print(len(paths) > 100, [path for path in paths + ["/proc/1/mem", "/proc/2/mem"] if opens(path)])
"""
    assert bwrap.run(program).stdout == "True []\n"


def test_bwrap_has_no_place_for_large_data(bwrap: Sandbox) -> None:
    """Every directory that can be written is bounded: not one file, but all files together."""
    program = (
        "import json, os\n"
        "def fill(path):\n"
        "    total = 0\n"
        "    try:\n"
        "        for number in range(8):\n"
        "            with open(f'{path}/{number}', 'wb') as file: total += file.write(bytes(1 << 20))\n"
        "    except OSError: pass\n"
        "    return total >> 20\n"
        "print(json.dumps({path: fill(path) for path in ('/', '/dev', '/usr', '/tmp', '/dev/shm')}))"
    )
    result = bwrap.run(program, limits=Limits(file_mb=4))
    sizes = json.loads(result.stdout)
    assert sizes["/"] == sizes["/dev"] == sizes["/usr"] == 0
    assert 2 <= sizes["/tmp"] <= 4 and 2 <= sizes["/dev/shm"] <= 4


def test_programs_die_with_the_server(sandbox: Sandbox) -> None:
    """The process that waits for the program is killed: so is the program."""
    mark = uuid.uuid4().hex
    waiting = (
        f"import sys; from rollout_server.sandbox import {type(sandbox).__name__} as Sandbox\n"
        f"Sandbox().run([sys.executable, '-c', 'import time; time.sleep(3600)', '{mark}'])"
    )
    with subprocess.Popen([sys.executable, "-c", waiting]) as server:
        program = f"{sys.executable}\0-c\0import time; time.sleep(3600)\0{mark}"
        while not any(line.startswith(program) for line in processes_with(mark)):
            time.sleep(0.01)
        server.kill()
    wait_until_gone(mark)


def test_rlimits_leaves_no_files() -> None:
    result = RlimitsSandbox().run("import os; open('x', 'w').write('y'); print(os.getcwd())")
    assert result.succeeded and not Path(result.stdout.strip()).exists()


def test_sandbox_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"install bubblewrap, or set rewards.sandbox=rlimits, which gives"):
        BwrapSandbox().check()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    with pytest.raises(ConfigError, match=r"setting up uid map: Permission denied.*needs user namespaces"):
        BwrapSandbox().check()


def test_unknown_sandbox_and_bad_limits() -> None:
    for kind in ("docker", "podman:", "bwrap:x", "gvisor", ""):
        with pytest.raises(ConfigError, match="choose one of bwrap, rlimits, docker:IMAGE"):
            make_sandbox(kind)
    with pytest.raises(ConfigError, match="sandbox limit timeout_s=0: must be above 0"):
        Limits(timeout_s=0)
