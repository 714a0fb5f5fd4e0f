"""The directory of one checkpoint, which all ranks write and which is either complete or absent."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from areal_like.errors import DiskFullError
from trainer.checkpoints.peers import PROBE, Peers

log = logging.getLogger(__name__)

_NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
"""The system's messages. Errors of other ranks arrive as text, and tokenizers raise their own classes."""


def write_directory(
    final: Path, peers: Peers, *, create: Callable[[Path], None], fill: Callable[[Path], None]
) -> DiskFullError | None:
    """Makes directory `final` appear with the files of all ranks, whole or not at all.

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
    """Removes checkpoints that a killed trainer left half written.

    On rank 0, while no other trainer of the run is alive.
    """
    for partial in root.glob(".step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for probe in root.glob(f"{PROBE}*"):
        probe.unlink(missing_ok=True)


_ROLLED_BACK = ".rolled_back"


def set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint of steps that were undone. Its time says when."""
    aside = checkpoint.with_name(f"{checkpoint.name}{_ROLLED_BACK}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    os.utime(aside)


def remove_rolled_back(root: Path, *, keep: int) -> None:
    """Deletes checkpoints that were set aside, but for the `keep` that were so last."""
    found = sorted(root.glob(f"step_*{_ROLLED_BACK}"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in found[: max(0, len(found) - keep)]:
        log.info("removing %s: of checkpoints of undone steps trainer.keep_rolled_back=%d stay", path, keep)
        shutil.rmtree(path, ignore_errors=True)


def _commit(partial: Path, final: Path) -> None:
    """Syncs every file before the rename: a directory with the final name is complete even after a crash."""
    for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder before the folder
        _sync(path)
    _sync(partial)
    if final.exists():  # the same step again, after a resume from an earlier step
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
