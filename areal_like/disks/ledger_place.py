"""Where the ledger of a run is to be, and whether it is safe there."""

from __future__ import annotations

from pathlib import Path

from areal_like.config import Config
from areal_like.disks.file_system import file_system_of, is_network
from areal_like.paths import RunPaths
from areal_like.shards import WHOLE, Shard


def wanted_place(config: Config, shard: Shard = WHOLE) -> Path:
    """The directory of a shard's ledger by the settings; `buffer/storage/place.py` makes the link to it."""
    if not config.buffer.ledger_dir:
        return RunPaths.of(config).ledger_of(shard)
    return Path(config.buffer.ledger_dir).expanduser().resolve() / config.name / shard.ledger


def network_warning(config: Config) -> str:
    """Why the place of the ledger is unsafe; empty if it is not, or if there is no ledger."""
    if config.buffer.durability == "none":
        return ""
    path = wanted_place(config)
    kind = file_system_of(path)
    if not is_network(kind):
        return ""
    return (
        f"the ledger is on a file system of type {kind} ({path.resolve()}): SQLite's WAL is unsafe there, a "
        "crash or a reader on another machine may damage it. Set buffer.ledger_dir to a directory on a local "
        "disk"
    )
