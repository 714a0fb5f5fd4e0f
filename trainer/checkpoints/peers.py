"""The agreement of all ranks about the checkpoint that their threads are writing.

The threads use a gloo group of their own: collectives of the training's groups need one order on all ranks,
which a thread beside the training cannot keep. When a rank dies, the others' connections break and they
learn of it at once. A rank that hangs is waited for with a limit. After either this group is of no more use.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from areal_like.errors import CheckpointError, ConfigError
from trainer.distributed.ranks import Ranks

_PATIENCE_S = 1800.0
"""Longest wait for a rank that is slower than this one: ranks write about the same number of bytes."""
_HURRIED_S = 60.0
"""The same while the trainer is ending after an error."""
_POLL_S = 0.02
_TEXT_BYTES = 512
"""Length of a rank's message; all zero: it has not failed."""
_VISIBLE_S = 40.0
"""Longest time until a rank sees what rank 0 has made: NFS clients may trust a directory they have read for
30 s."""


PROBE = ".shared-"
"""Beginning of the name of a file that rank 0 makes and the others look for."""
_NONE = -1

log = logging.getLogger(__name__)


class Peers:
    """The threads of all ranks. Create it on all ranks at the same time."""

    def __init__(self, ranks: Ranks) -> None:
        """Collective."""
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self._hurried = threading.Event()
        self._group = (
            None
            if ranks.world_size == 1
            else dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE_S))
        )

    def together(self, action: Callable[[], None]) -> None:
        """Runs this rank's action and waits until every rank has run its own.

        Raises on every rank if one failed: its own error on the rank that failed, else CheckpointError with
        the messages of the ranks that failed, or that a rank was lost.
        """
        try:
            action()
        except BaseException as error:
            self._exchange(f"{type(error).__name__}: {error}")
            raise
        if failures := self._exchange(""):
            raise CheckpointError("; ".join(failures))

    def hurry(self) -> None:
        """Waits only a minute from now on: other ranks may be gone."""
        self._hurried.set()

    def _exchange(self, text: str) -> list[str]:
        """Sends this rank's message, or "", to all; returns all messages that are not empty."""
        if self._group is None:
            return [text] if text else []
        own = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        data = text.encode()[:_TEXT_BYTES]
        own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        try:
            work = dist.all_gather(parts, own, group=self._group, async_op=True)
            assert work is not None
            self._wait(work)
        except RuntimeError as error:
            # Closes this rank's connections: a lost rank breaks only those of its neighbours in the group.
            dist.destroy_process_group(self._group)
            raise CheckpointError(f"a rank of the trainer was lost during a checkpoint: {error}") from None
        texts = [bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in parts]
        return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]

    def _wait(self, work: dist.Work) -> None:
        started_s = time.monotonic()
        hurried_s: float | None = None
        while not work.is_completed():
            now_s = time.monotonic()
            if hurried_s is None and self._hurried.is_set():
                hurried_s = now_s
            if now_s - started_s > _PATIENCE_S or (hurried_s and now_s - hurried_s > _HURRIED_S):
                # The group's destructor waits for the other ranks too: this keeps the group until the process
                # has ended.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
                raise CheckpointError(
                    f"other ranks have not written their parts {now_s - started_s:.0f} s after this one"
                )
            time.sleep(_POLL_S)
        work.wait()


def check_shared(directory: Path, ranks: Ranks, *, visible_s: float = _VISIBLE_S) -> None:
    """Raises ConfigError on every rank if one does not see a file that rank 0 makes. Collective."""
    if ranks.world_size == 1:
        return
    number = secrets.randbits(48)
    if ranks.rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{PROBE}{number}").touch()
        except OSError as error:  # a full disk, which ends no training
            log.warning("cannot check that all ranks see %s: %s", directory, error)
            number = _NONE
    if (number := ranks.agree(number)) == _NONE:
        return
    probe = directory / f"{PROBE}{number}"
    is_blind = not wait_until_visible(probe, visible_s)
    blind = ranks.gather(torch.tensor([ranks.rank] if is_blind else [], dtype=torch.int64)).tolist()
    if ranks.rank == 0:
        probe.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"trainer ranks {', '.join(map(str, blind))} do not see {directory} of rank 0: "
            "runs_dir has to be on a file system that all hosts of the trainer share"
        )


def wait_until_visible(path: Path, seconds: float = _VISIBLE_S) -> bool:
    """Waits until another host's file or directory can be seen here; returns False if it cannot."""
    end_s = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.2)
    return True
