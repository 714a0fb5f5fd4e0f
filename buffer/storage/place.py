"""The location of a shard's ledger: the run's directory, or another disk to which a link there leads.

    <runs_dir>/<name>/ledger                                     without `buffer.ledger_dir`
    <runs_dir>/<name>/ledger -> <ledger_dir>/<name>/ledger       with it

Every reader finds the ledger through the link and needs no setting. A link whose directory is missing is an
error: a buffer that was started on another machine must not begin a second, empty ledger.
"""

from __future__ import annotations

from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.ledger_place import recorded_shards, wanted_place
from areal_like.paths import RunPaths
from areal_like.shards import WHOLE, Shard
from buffer.storage.segments import sync_directory


def open_place(config: Config, *, shard: Shard = WHOLE) -> Path:
    """The directory of the shard's ledger; makes the link to it if `buffer.ledger_dir` needs one.

    Raises ConfigError if the run's ledger is elsewhere, or the run has another number of shards.
    """
    count = recorded_shards(RunPaths.of(config))
    if count is not None and count != shard.count:  # before it begins a second, empty ledger
        raise ConfigError(
            f"buffer.num_shards={shard.count}: the ledgers of this run are of {count}, and the number of "
            f"shards cannot change during a run: set buffer.num_shards={count}"
        )
    path, target = RunPaths.of(config).ledger_of(shard), wanted_place(config, shard)
    if path.is_symlink() and not path.is_dir():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which this machine does not have: start the buffer on "
            "the machine that has it, or copy it from there. To give up the groups in it, remove the link: "
            "the run then continues from its newest checkpoint with a new ledger"
        )
    if target == path or (path.is_symlink() and path.resolve() == target.resolve()):
        return path
    if path.is_symlink() or _holds_files(path):
        raise ConfigError(
            f"buffer.ledger_dir={config.buffer.ledger_dir}, but the ledger of this run is in "
            f"{path.resolve()}: give the same buffer.ledger_dir as before, or move that directory to "
            f"{target} and make {path} a link to it"
        )
    if _holds_files(target):
        raise ConfigError(
            f"{target} holds the ledger of another run: choose another buffer.ledger_dir or name=..., or "
            f"remove it. If it is this run's, make {path} a link to it"
        )
    _make_link(path, target)
    return path


def _holds_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _make_link(path: Path, target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rmdir()
        path.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise ConfigError(
            f"the ledger cannot be in {target} with a link in {path.parent}: {error.strerror}; "
            "choose another buffer.ledger_dir"
        ) from None
    for directory in (target.parent, path.parent):
        sync_directory(directory)
