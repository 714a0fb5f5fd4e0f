"""The state of a run directory, and children that do not end."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from areal_like.paths import RunPaths, write_json
from launch.local_job.child import ProcessTable
from launch.local_job.specs import ChildSpec
from launch.run_directory.rundir import (
    RestartOrder,
    is_held,
    lock,
    remove_unbegun,
    restart_order_file,
    take_restart_order,
)


def test_orders_are_taken_once_the_oldest_first(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert take_restart_order(paths) is None
    orders = [
        RestartOrder(role="trainer", settings=["trainer.lr=1"], order_id="b"),
        RestartOrder(role="rollout-0", settings=[], order_id="a"),
    ]
    for at, order in enumerate(orders):  # two commands, before the launcher has looked
        file = restart_order_file(paths, order.order_id)
        write_json(file, asdict(order))
        os.utime(file, ns=(at, at))
    assert [take_restart_order(paths) for _ in range(3)] == [*orders, None]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"role": 1}', '{"role": "x", "settings": null}'])
def test_a_damaged_order_is_removed(text: str, tmp_path: Path) -> None:
    restart_order_file(RunPaths(tmp_path), "a").write_text(text)
    assert take_restart_order(RunPaths(tmp_path)) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("file", "stays"), [("evaluations.jsonl", False), ("notes.txt", True)])
def test_a_refused_run_leaves_only_what_is_not_its_own(file: str, stays: bool, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "x")
    os.close(lock(paths))
    for path in paths.named:
        path.mkdir() if path == paths.checkpoints else path.touch()
    (paths.root / file).touch()
    remove_unbegun(paths)
    assert paths.root.exists() == stays


def test_a_run_with_a_step_is_not_removed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.write_text("{}\n")
    remove_unbegun(paths)
    assert paths.metrics.exists()


def test_a_full_disk_does_not_keep_the_lock_from_its_owner(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write fails
    try:
        lock_fd = lock(RunPaths(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_held(RunPaths(tmp_path))
    os.close(lock_fd)


def test_a_child_that_hangs_in_the_kernel_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    lock_fd = lock(paths)
    children = ProcessTable(paths, lock_fd=lock_fd)
    children.start(ChildSpec(name="buffer", command=("http.server", "0")))
    wait = subprocess.Popen.wait

    def hangs(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert timeout is not None, "an unbounded wait"
        wait(process)
        raise subprocess.TimeoutExpired("buffer", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", hangs)
    children.kill("buffer")
    assert not children.names
    os.close(lock_fd)


def test_a_child_that_cannot_be_started_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    lock_fd = lock(paths)
    children = ProcessTable(paths, lock_fd=lock_fd)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    children.start(ChildSpec(name="rollout-0", command=("rollout_server",)))
    children.terminate("rollout-0")
    assert children.names == ["rollout-0"]
    ended = children.reap("rollout-0")
    assert ended is not None and ended.code == 1 and "/nowhere/python" in ended.last_words[0]
    assert not children.names
    os.close(lock_fd)
