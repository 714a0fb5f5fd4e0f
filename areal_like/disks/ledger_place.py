"""Where the ledger of a run is to be, whether it is safe there, and which shards have written one."""

from __future__ import annotations

import sqlite3
from contextlib import closing
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


def recorded_shards(paths: RunPaths) -> int | None:
    """The number of buffers (`buffer.num_shards`) whose ledgers have tickets of this run; None: none has.

    A ledger without tickets is left out: its buffer was stopped before it issued one.
    """
    counts = (shards_of(directory) for directory in paths.ledger_places)
    return next((count for count in counts if count is not None), None)


def shards_of(directory: Path) -> int | None:
    """The number of shards of the buffer that has written a ledger; None without tickets."""
    query = (
        "SELECT coalesce((SELECT value FROM marks WHERE name = 'num_shards'), 1) "
        "WHERE EXISTS (SELECT 1 FROM tickets)"
    )
    try:
        with closing(sqlite3.connect(f"file:{directory}/ledger.sqlite3?mode=ro", uri=True)) as ledger:
            found = ledger.execute(query).fetchone()
    except sqlite3.Error:  # there is none, it is damaged, or locked: its buffer will say so
        return None
    return None if found is None else int(found[0])


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
