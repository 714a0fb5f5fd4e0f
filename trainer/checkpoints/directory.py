"""Writes the directory of one checkpoint: all ranks write to it, and it is either complete or absent.

The ranks agree on each stage (`Peers`) in threads, over a separate gloo group: collectives of the training's
groups need the same order on all ranks, which a concurrent thread cannot guarantee. When a rank dies, the
others' connections break at once. The wait for a rank that hangs is limited. After either this group cannot
be used any more.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from areal_like.errors import CheckpointError, ConfigError, DiskFullError
from trainer.distributed.ranks import Ranks

log = logging.getLogger(__name__)

_NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
"""System messages that mean a full disk: errors of other ranks arrive as text, and tokenizers raise their own
classes."""


def write_directory(
    final: Path, peers: Peers, *, create: Callable[[Path], None], fill: Callable[[Path], None]
) -> DiskFullError | None:
    """Creates directory `final` with the files of all ranks, complete or not at all.

    Every rank calls it, in a thread. `create`: called with a new directory on rank 0, before any rank's
    `fill`; every rank syncs what it wrote in `fill`. Rank 0 renames the directory when all have returned.
    Returns on every rank the error if one had no space; any other error is raised on every rank. It is
    returned and not raised because a raised error's traceback would keep memory alive.
    """
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        if peers.rank == 0:
            remove_partials(final.parent)
            partial.mkdir(parents=True)
            create(partial)

    def commit() -> None:
        if peers.rank == 0:
            _commit(partial, final)

    try:
        peers.together(begin)
        peers.together(lambda: fill(partial))
        peers.together(commit)
    except BaseException as error:
        if peers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # at once: the ledger may be waiting for this space
        if not any(message in str(error) for message in _NO_SPACE):
            raise
        full = DiskFullError(
            f"{final} was not written ({error}): free space there, or lower trainer.keep_checkpoints"
        )
        log.error("this checkpoint is skipped: %s", full)
        return full
    return None


def remove_partials(root: Path) -> None:
    """Removes checkpoints that a killed trainer left half written, or half deleted.

    On rank 0, while no other trainer of the run is alive.
    """
    for partial in root.glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for probe in root.glob(f"{PROBE}*"):
        probe.unlink(missing_ok=True)


_ROLLED_BACK = ".rolled_back"


def set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint of steps that were undone. Its modification time is the time of the rename."""
    aside = checkpoint.with_name(f"{checkpoint.name}{_ROLLED_BACK}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    os.utime(aside)


def remove_rolled_back(root: Path, *, keep: int) -> None:
    """Deletes checkpoints that were set aside, except the `keep` most recent ones."""
    found = sorted(root.glob(f"step_*{_ROLLED_BACK}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in found[: max(0, len(found) - keep)]:
        log.info("removing %s: of checkpoints of undone steps trainer.keep_rolled_back=%d stay", path, keep)
        shutil.rmtree(path, ignore_errors=True)


def _commit(partial: Path, final: Path) -> None:
    """Syncs every file before the rename: a directory with the final name is complete even after a crash."""
    for path in sorted(partial.rglob("*"), reverse=True):  # the content of a folder before the folder
        _sync(path)
    _sync(partial)
    replaced = final.with_name(f".{final.name}.replaced.partial")
    if is_again := final.exists():  # the same step again, after a resume from an earlier step
        final.rename(replaced)
    partial.rename(final)
    _sync(final.parent)
    if is_again:
        shutil.rmtree(replaced)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, which loses its name first: one that a crash leaves half deleted must not look
    complete. `remove_partials` deletes the rest."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.pruned.partial")
    checkpoint.rename(doomed)
    _sync(doomed.parent)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_PATIENCE_S = 1800.0
"""Longest wait for a slower rank: ranks write about the same number of bytes."""
_HURRIED_S = 60.0
"""Longest wait for a slower rank while the trainer is ending after an error."""
_POLL_S = 0.02
_TEXT_BYTES = 512
"""Length of a rank's message; all zero: it has not failed."""
_VISIBLE_S = 40.0
"""Longest time until a rank sees a file that rank 0 has made: NFS clients may cache a directory for 30 s."""


PROBE = ".shared-"
"""Beginning of the name of a file that rank 0 makes and the others look for."""
_NONE = -1


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
            # Closes this rank's connections: a lost rank breaks only the connections of its neighbours in the
            # group.
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
        except OSError as error:  # a full disk must not end the training
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
