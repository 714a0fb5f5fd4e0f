"""CPU time by role: what counts as whose, and a short job."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from areal_like.runtime.threads import NamedThread
from benchmarks.cpu_by_role import (
    Process,
    Usage,
    as_table,
    difference,
    measured,
    read_process,
    role_of,
    threads,
)

BURN = "import time; end = time.process_time() + .2\nwhile time.process_time() < end: pass"


def process(parent: int, *words: str) -> Process:
    return Process(parent=parent, cpu_ms=0.0, words=words)


def test_roles_come_from_the_nearest_ancestor() -> None:
    living = {
        1: process(0, "python", "-m", "launch", "run"),
        2: process(1, "python", "-m", "rollout_server", "--name", "rollout-0"),
        3: process(2, "python", "-m", "rollout_server.engine"),
        4: process(3, "nvcc"),
        5: process(2, "bwrap", "sh"),
        6: process(1, "python", "-m", "trainer", "--config", "x"),
        7: process(6, "python", "-m", "trainer"),
    }
    roles = {pid: role_of(pid, living) for pid in living}
    assert roles == {
        1: "launcher", 2: "rollout server", 3: "engine", 4: "engine", 5: "rollout server", 6: "trainer",
        7: "trainer",
    }  # fmt: skip
    assert role_of(4, {4: living[4]}) == "other"


def test_children_that_have_ended_are_their_parents() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}]);"
         "print(1, flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None and parent.stdin is not None
        parent.stdout.readline()
        found = read_process(parent.pid)
        own_ms = sum(cpu_ms for _, cpu_ms in threads(parent.pid))
        parent.stdin.close()
    assert found is not None and found.cpu_ms > own_ms + 150
    assert read_process(parent.pid) is None


def test_threads_have_the_names_that_they_were_given() -> None:
    may_end = threading.Event()
    work = NamedThread(may_end.wait, name="ledger-writer")
    work.start()
    pid = int(Path("/proc/self").readlink().name)
    while "ledger-writer" not in dict(threads(pid)):
        time.sleep(0.01)
    names = dict(threads(pid))
    may_end.set()
    work.join()
    assert "ledger-writer" in names and names["main"] > 0


def test_difference_is_divided_by_steps() -> None:
    before = Usage(by_role=Counter(engine=100.0), by_thread=Counter({("engine", "main"): 60.0}))
    after = Usage(
        by_role=Counter(engine=300.0, rewards=4.0),
        by_thread=Counter({("engine", "main"): 220.0, ("engine", "new"): 20.0}),
        num_processes=Counter(engine=2, rewards=1),
    )
    rows = [{"num_sequences": 8, "prompt_tokens": 5.5, "response_length_mean": 7.0}] * 2
    result = difference(before, after, rows=rows, seconds=1.0)
    engine = result["roles"]["engine"]
    assert result["step_ms"] == 102.0 and result["samples_per_step"] == 8
    assert engine["step_ms"] == 100.0 and engine["threads_ms"] == {"main": 80.0, "new": 10.0}
    assert engine["rest_ms"] == 10.0 and engine["sample_ms"] == 12.5
    assert engine["thousand_tokens_ms"] == 1000.0
    assert "| all |  | 102.0 | 12.75 | 1020.00 |" in as_table(result)


@pytest.mark.chaos
@pytest.mark.slow
def test_a_job_is_measured_by_role(tmp_path: Path) -> None:
    result = measured(["trainer.groups_per_step=2"], warm_up=2, num_steps=30, runs_dir=tmp_path)
    assert set(result["roles"]) == {
        "trainer", "engine", "rollout server", "buffer", "task workers", "launcher",
    }  # fmt: skip
    assert result["steps"] >= 30 and result["step_ms"] > 0
    assert "ledger-writer" in result["roles"]["buffer"]["threads_ms"]
    assert result["roles"]["trainer"]["threads_ms"]["main"] > 1
