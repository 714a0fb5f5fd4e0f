"""Malformed, truncated, oversized and pickled frames beside a job at work: counted and refused, process alive, memory flat, books clean."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import zmq

from launch.audit import audit_run
from tests.chaos.frames import malformed
from tests.chaos.plant import check_groups, plant, train

MAX_MESSAGE_BYTES = 1 << 20
_BATCH = 1000


def flood(directory: Path, *, num_frames: int, num_oversized: int) -> None:
    trainer = {"num_steps": 20, "groups_per_step": 8, "fetch_timeout_s": 60.0}
    buffer = {"lease_timeout_s": 2.0, "max_message_bytes": MAX_MESSAGE_BYTES}
    with plant(directory, trainer=trainer, buffer=buffer) as job, job.trainer() as link:
        job.produce("rollout-0")
        groups = train(link, first=0, last=10)
        frames = malformed(seed=0)
        num_sent = _send(job.buffer.address, list(islice(frames, _BATCH)))
        job.buffer.wait_status(lambda status: status["bad_frames"] == num_sent, timeout_s=30)
        rss_bytes = job.buffer.rss_bytes()
        while num_sent < num_frames:
            num_sent += _send(job.buffer.address, list(islice(frames, _BATCH)))
            # Queues of sockets are not what is measured.
            job.buffer.wait_status(lambda status, seen=num_sent - 2 * _BATCH: status["bad_frames"] >= seen, timeout_s=60)
        job.buffer.wait_status(lambda status: status["bad_frames"] == num_frames, timeout_s=60)
        for _ in range(num_oversized):
            _send(job.buffer.address, [[bytes(MAX_MESSAGE_BYTES + 1)]], linger_ms=200)
        assert job.buffer.status()["bad_frames"] == num_frames, "what is too large never gets as far as being decoded"
        assert job.buffer.rss_bytes() < 1.05 * rss_bytes
        groups += train(link, first=10, last=20)
        check_groups(groups, job.config, first=0, last=20)
        assert job.buffer.process.poll() is None
        report = audit_run(job.buffer.paths.root)
        assert report.is_clean, "\n".join(report.lines())


def _send(address: str, messages: list[list[bytes]], *, linger_ms: int = 30_000) -> int:
    """Sends them from a peer of its own; returns how many."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, linger_ms)
    socket.connect(address)
    for frames in messages:
        socket.send_multipart(frames)
    socket.close()
    context.term()  # returns when all is sent
    return len(messages)


@pytest.mark.timeout(120)
def test_ten_thousand_malformed_frames(tmp_path: Path) -> None:
    flood(tmp_path, num_frames=10_000, num_oversized=3)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_million_malformed_frames(tmp_path: Path) -> None:
    flood(tmp_path, num_frames=1_000_000, num_oversized=50)
