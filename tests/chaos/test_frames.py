"""Malformed, truncated, oversized and pickled frames during a job are refused and counted, and do no harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zmq

from launch.audit.run import audit_run
from tests.chaos.frames import malformed
from tests.chaos.job import check_groups, running_job, train
from tests.support.waiting import HANG_LIMIT_S

MAX_MESSAGE_BYTES = 1 << 20
_BATCH = 1000


def flood(directory: Path, *, num_frames: int, num_oversized: int) -> None:
    trainer = {"num_steps": 20, "groups_per_step": 8, "fetch_timeout_s": 600.0}
    # No peer of the job may be forgotten: what it sends then is refused, too.
    buffer = {"lease_timeout_s": HANG_LIMIT_S, "max_message_bytes": MAX_MESSAGE_BYTES}
    with running_job(directory, trainer=trainer, buffer=buffer) as job, job.trainer() as client:
        job.produce("rollout-0")
        groups = train(client, first=0, last=10)
        frames = malformed(seed=0)
        rss_bytes = 0
        for num_sent in range(_BATCH, num_frames + 1, _BATCH):
            with _sent(job.buffer.address, list(islice(frames, _BATCH))):
                job.buffer.wait_status(lambda status, all_sent=num_sent: num_refused(status) == all_sent)
            rss_bytes = rss_bytes or job.buffer.rss_bytes()
        for _ in range(num_oversized):
            with _sent(job.buffer.address, [[bytes(MAX_MESSAGE_BYTES + 1)]]):
                time.sleep(0.2)
        assert num_refused(job.buffer.status()) == num_frames, "a message that is too large was decoded"
        assert job.buffer.rss_bytes() < 1.05 * rss_bytes
        groups += train(client, first=10, last=20)
        check_groups(groups, job.config, first=0, last=20)
        assert job.buffer.process.poll() is None
        audit = audit_run(job.buffer.paths.root)
        assert audit.is_clean, "\n".join(audit.lines())


def num_refused(status: dict[str, Any]) -> int:
    """Malformed messages, and those that were not looked at because their sender has not registered."""
    return int(status["bad_frames"] + status["unregistered_frames"])


@contextmanager
def _sent(address: str, messages: list[list[bytes]]) -> Iterator[None]:
    """Sends messages from a socket that stays open.

    Closing it with unread replies would reset the connection and lose the messages under way.
    """
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.connect(address)
    for frames in messages:
        socket.send_multipart(frames)
    yield
    socket.close()
    context.term()


def test_ten_thousand_malformed_frames(tmp_path: Path) -> None:
    flood(tmp_path, num_frames=10_000, num_oversized=3)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_million_malformed_frames(tmp_path: Path) -> None:
    flood(tmp_path, num_frames=1_000_000, num_oversized=50)
