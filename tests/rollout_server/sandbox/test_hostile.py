"""What a hostile program tries against the machine and the job, from within bwrap and with real targets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from rollout_server.sandbox import BwrapSandbox, Limits, RlimitsSandbox
from tests.support.launching import ROOT

SECRET = "planted-secret"


@pytest.fixture(scope="module")
def bwrap() -> BwrapSandbox:
    sandbox = BwrapSandbox()
    try:
        sandbox.check()
    except ConfigError as error:
        pytest.skip(str(error))
    return sandbox


@pytest.fixture
def outside_tmp() -> Iterator[Path]:
    """A directory that is not below /tmp, which the sandbox replaces anyway."""
    path = Path(tempfile.mkdtemp(prefix="areal-like-test-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


SERVER = """
import json, os, sys
from rollout_server.sandbox import BwrapSandbox, Limits
program = sys.stdin.read().replace("SERVER_PID", str(os.getpid()))
descriptor = os.open("ledger", os.O_RDONLY)
os.set_inheritable(descriptor, True)
result = BwrapSandbox().run(program, stdin="ours", limits=Limits(timeout_s=600, output_bytes=1 << 20))
print(json.dumps([result.stdout, result.stderr]))
"""
"""A rollout server in its run directory, with an open ledger, a token in its environment, and a home."""

READER = """
import glob, os
opened = []
def read(path):
    try:
        if os.path.isdir(path):
            for name in os.listdir(path):
                if not os.path.isdir(f"{path}/{name}"):
                    read(f"{path}/{name}")
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    opened.append(path)
    try:
        print(path, os.read(descriptor, 65536))
    except OSError:
        pass
    os.close(descriptor)
targets = TARGETS
for number, path in enumerate(targets):
    read(path)
    link = f"{os.environ['TMPDIR']}/link{number}"
    os.symlink(path, link)
    read(link)
    read("/tmp/" + "../" * 20 + path)
    for pid in ("self", *PIDS, os.getppid(), SERVER_PID):
        read(f"/proc/{pid}/root{path}")
for pid in ("self", "thread-self", *PIDS, os.getppid(), SERVER_PID):
    for name in ("cwd", "cwd/ledger", "environ", "cmdline", "fd", "map_files", "root/proc/1/environ"):
        read(f"/proc/{pid}/{name}")
for descriptor in range(3, 256):
    try:
        os.lseek(descriptor, 0, 0)
        print(descriptor, os.read(descriptor, 65536))
    except OSError:
        pass
print(dict(os.environ), os.path.exists("/proc/SERVER_PID"))
print("OPENED", len(opened))
"""


def test_files_of_the_job_cannot_be_read(bwrap: BwrapSandbox, tmp_path: Path, outside_tmp: Path) -> None:
    """Not by their names, links, parent directories, other processes, descriptors or the environment."""
    targets = []
    for place in (tmp_path, outside_tmp):
        for folder in ("run", "home"):
            (place / folder).mkdir()
            for name in ("ledger", ".netrc"):
                (place / folder / name).write_text(SECRET)
                targets += [str(place / folder / name), str(place / folder)]
    targets.append("/etc/passwd")
    # Where nothing may be found, it also looks for what is not the test's.
    others = ["/etc/shadow", "/root", "/home", "/var/tmp", "/run", str(ROOT)]
    hostile = read_in("BwrapSandbox", targets + others, outside_tmp, pids=["1", "2"])
    assert SECRET not in hostile and "AREAL_TOKEN" not in hostile and "root:x:" not in hostile
    without = read_in("RlimitsSandbox", targets, outside_tmp, pids=[])
    assert without.count(SECRET) > 20 and "root:x:" in without  # the program does know how to read them


def read_in(sandbox: str, targets: list[str], outside_tmp: Path, *, pids: list[str]) -> str:
    """What the reader says in a sandbox of a server in `outside_tmp`."""
    server = subprocess.run(
        [sys.executable, "-c", SERVER.replace("BwrapSandbox", sandbox)],
        input=READER.replace("TARGETS", repr(targets)).replace("PIDS", repr(pids)),
        cwd=outside_tmp / "run",
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(outside_tmp / "home"),
            "AREAL_TOKEN": SECRET,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    stdout, stderr = json.loads(server.stdout)
    assert not stderr and "OPENED" in stdout, (stdout, stderr)
    return str(stdout)


def test_nothing_of_the_machine_answers(bwrap: BwrapSandbox, tmp_path: Path) -> None:
    """Listeners of the server: TCP on both loopbacks, UDP, and unix sockets with and without a file."""
    abstract = f"\0areal-like-{uuid.uuid4().hex}"
    by_name = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        addresses: list[tuple[int, int, object]] = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, abstract),
            (socket.AF_UNIX, socket.SOCK_STREAM, by_name),
        ):
            listener = stack.enter_context(socket.socket(family, kind))
            try:
                listener.bind(address)
            except OSError:
                continue  # a machine without IPv6
            if kind == socket.SOCK_STREAM:
                listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
            bound = listener.getsockname()
            name = bound.decode("latin-1") if isinstance(bound, bytes) else bound
            addresses.append((int(family), int(kind), name))
        program = textwrap.dedent(f"""
            import socket
            reached = 0
            for family, kind, address in {addresses!r}:
                with socket.socket(family, kind) as client:
                    client.settimeout(1)
                    try:
                        client.connect(address if isinstance(address, str) else tuple(address))
                        client.sendall(b"hello")
                        reached += kind == socket.SOCK_STREAM
                    except OSError:
                        pass
            try:
                names = socket.if_nameindex()
            except OSError:
                names = []
            print(reached, [name for _, name in names if name != "lo"])
        """)
        result = bwrap.run(program)
        assert result.stdout == "0 []\n", result
        assert len(listeners) >= 4
        for listener in listeners:  # the kernel would have taken the connection
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()
        without = RlimitsSandbox().run(program)  # the program does know how to reach them
        assert int(without.stdout.split()[0]) == len(listeners) - 1, without


def marked(mark: str) -> list[int]:
    """Processes of the machine with `mark` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_process_that_moves_does_not_outlive_its_program(bwrap: BwrapSandbox) -> None:
    """Each child leaves the session, forks and ends, in a circle, and ignores all signals."""
    mark = uuid.uuid4().hex
    program = textwrap.dedent("""
        import os, signal, sys, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        for _ in range(4):
            if os.fork() == 0:
                for descriptor in (0, 1, 2): os.close(descriptor)
                while True:
                    os.setsid()
                    if os.fork(): os._exit(0)
        print("started")
        time.sleep(DELAY)
    """)
    for delay_s, times_out in (("0.1", False), ("3600", True)):
        command = [sys.executable, "-u", "-c", program.replace("DELAY", delay_s), mark]
        for timeout_s in (2.0, 20.0, 200.0) if times_out else (600.0,):  # a busy machine starts it late
            result = bwrap.run(command, limits=Limits(timeout_s=timeout_s))
            if result.stdout:
                break
        assert result.stdout == "started\n", result
        assert result.timed_out == times_out
        while marked(mark):
            time.sleep(0.02)


def test_a_flood_of_empty_files_is_ended(bwrap: BwrapSandbox) -> None:
    """Their bytes count nothing; the kernel's memory for each of them does."""
    program = (
        "import os\n"
        "for place in ('/tmp', '/dev/shm'):\n"
        "    for number in range(10**7):\n"
        "        os.close(os.open(f'{place}/{number}', os.O_CREAT | os.O_WRONLY))\n"
    )
    result = bwrap.run(program, limits=Limits(timeout_s=600))
    assert result.exit_code == 137 and not result.timed_out and "more than 65536 files" in result.stderr


def test_descriptors_and_disk_are_bounded(bwrap: BwrapSandbox) -> None:
    program = textwrap.dedent("""
        import json, os
        opened = []
        try:
            while len(opened) < 5000: opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error: print(error.errno, len(opened))
        for descriptor in opened: os.close(descriptor)
        written = 0
        try:
            for number in range(200):
                with open(f"/tmp/{number}", "wb") as file: written += file.write(bytes(1 << 20))
        except OSError as error: print(error.errno, written >> 20)
        os.symlink("/dev/zero", "/tmp/zero")
        try: os.mknod("/tmp/disk", 0o660 | 0o060000, os.makedev(8, 0))
        except OSError as error: print(error.errno)
    """)
    result = bwrap.run(program, limits=Limits(file_mb=8))
    (descriptors_errno, num_open), (disk_errno, num_mb), (mknod_errno,) = (
        map(int, line.split()) for line in result.stdout.splitlines()
    )
    assert descriptors_errno == 24 and num_open < 256
    assert disk_errno == 28 and num_mb <= 8
    assert mknod_errno in (1, 28)
