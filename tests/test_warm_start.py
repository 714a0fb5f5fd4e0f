"""A forked process (tests/support/warm_start.py) is what `python -m` would have made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm_start
from tests.support.waiting import is_alive

REPORT = """
import json, os, resource, signal, sys
from pathlib import Path
own = Path("/proc/self")
print(json.dumps({
    "parent": os.getppid(),
    "group": os.getpgrp() - os.getpid() if os.getpgrp() == os.getpid() else os.getpgrp(),
    "session": os.getsid(0) == os.getpid() or os.getsid(0),
    "command line": own.joinpath("cmdline").read_bytes().rstrip(b"\\0").decode(),
    "environment": sorted(own.joinpath("environ").read_bytes().rstrip(b"\\0").decode().split("\\0")),
    "environ": dict(os.environ),
    "files": sorted(int(path.name) for path in own.joinpath("fd").iterdir()),
    "arguments": sys.argv,
    "directory": os.getcwd(),
    "umask": os.umask(0),
    "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
    "ignored": [n for n in range(1, 32) if signal.getsignal(n) == signal.SIG_IGN],
    "path": sys.path[:2],
    "buffered": not sys.stdout.write_through,
}))
"""


def started(start: Callable[..., Any], folder: Path, **options: Any) -> dict[str, Any]:
    """What a process says about itself."""
    reading, writing = os.pipe()
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN), os.umask(0o027)
    try:
        process = start(
            [sys.executable, "-c", REPORT, "one", ""],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": "/elsewhere", "PYTHONUNBUFFERED": "1", "X": "a b"},
            stdout=subprocess.PIPE,
            pass_fds=(writing,),
            **options,
        )
        out, _ = process.communicate()
    finally:
        os.umask(previous[1])
        signal.signal(signal.SIGHUP, previous[0])
        os.close(reading)
        os.close(writing)
    return dict(json.loads(out))


@pytest.mark.parametrize("start_new_session", [False, True])
def test_a_fork_is_like_a_new_interpreter(tmp_path: Path, start_new_session: bool) -> None:
    forked, new = (
        started(start, tmp_path, start_new_session=start_new_session)
        for start in (warm_start.Popen, subprocess.Popen)
    )
    assert forked == new


def test_ends_are_those_of_an_interpreter() -> None:
    ends = {
        "": (0, "", ""),
        "import sys; sys.exit(3)": (3, "", ""),
        "import sys; sys.exit('wrong')": (1, "", "wrong\n"),
        "import atexit; atexit.register(print, 'end')": (0, "end\n", ""),
        "import threading, time; threading.Timer(0.1, lambda: print('thread')).start()": (0, "thread\n", ""),
        "import os; os.kill(os.getpid(), 9)": (-signal.SIGKILL, "", ""),
    }
    for code, expected in ends.items():
        done = warm_start.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == expected
    failed = warm_start.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError: division by zero\n")


PARENT = """
import subprocess, sys, time
from tests.support import warm_start
warm_start.MODULES = (*warm_start.MODULES, "grandchild")
child = subprocess.Popen([sys.executable, "-m", "grandchild"])
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import os, time
from pathlib import Path
from areal_like.runtime.process import die_with_parent
die_with_parent()
Path("written").write_text(str(os.getppid()))
Path("written").rename("ready")
time.sleep(600)
"""


def test_forks_and_nurseries_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()  # a program of this name may have children, and this one comes first
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "__main__.py").write_text(PARENT)
    (tmp_path / "grandchild.py").write_text(CHILD)
    parent = warm_start.Popen(
        [sys.executable, "-m", "launch"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(warm_start.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert int((tmp_path / "ready").read_text()) == parent.pid
    below = {int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()}
    assert child in below and len(below) == 2, "the child, and the nursery from which it was forked"
    parent.kill()
    parent.communicate()
    while any(is_alive(pid) for pid in below):
        time.sleep(0.01)
