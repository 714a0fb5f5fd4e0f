"""Tests of a worker's serve loop without processes."""

from __future__ import annotations

import socket

from pytest import CaptureFixture, mark

from rollout_server import frames
from rollout_server.tasks.sort import SortTask
from rollout_server.workers.zygote import serve

SETUP = {
    "role": "reward",
    "options": {"timeout_s": 1.0},
    "task": {"name": "sort"},
    "seed": 0,
    "sandbox": "none",
}


@mark.parametrize("sent", [b"", b"\x05\x00", frames.pack(SETUP)], ids=["nothing", "half a header", "setup"])
def test_a_worker_ends_quietly_if_its_server_ends_first(sent: bytes, capfd: CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(sent)
    ours.close()
    with theirs:
        serve(theirs, task=SortTask(seed=0))
    assert capfd.readouterr().err == ""
