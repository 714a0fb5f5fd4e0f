"""Where the ledger of a run belongs, how to read it, and whether its file system is safe.

SQLite's WAL is only safe on a local file system: in WAL mode all processes that use a ledger share memory
through the file `ledger.sqlite3-shm`. Over a network two machines have two copies of it, and some network
file systems have no locks either.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import StoreCorruptError
from areal_like.paths import RunPaths
from areal_like.shards import WHOLE, Shard

LEDGER_FILE = "ledger.sqlite3"

_NETWORK = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
    }
)
"""Types of network and cluster file systems, as the kernel names them."""
_ADDED_TABLES = (
    (2, "operations (id INTEGER PRIMARY KEY, unix_s, verb, subject, detail)"),
    (3, "evaluations (first_ticket INTEGER PRIMARY KEY, eval_id, eval_set, num_prompts, num_samples, state)"),
    (4, "settings (id INTEGER PRIMARY KEY, step, key, value, origin, unix_s)"),
    (5, "parts (ticket_id, sample_index, position_id, slot, PRIMARY KEY (ticket_id, sample_index))"),
)
_ADDED_COLUMNS = {
    "tickets": (
        (3, "'' AS eval_set"),
        (5, "-1 AS begin_step"),
        (5, "-1 AS close_step"),
        (5, "'[]' AS early"),
    ),
    "samples": ((3, "0 AS truncated"), (3, "'' AS failure"), (5, "'[]' AS token_steps")),
    "failures": ((3, "0 AS given_up"),),
}
"""(schema version, what its migration in buffer/storage/sql.py has added)"""


def wanted_place(config: Config, shard: Shard = WHOLE) -> Path:
    """The directory of a shard's ledger by the settings; `buffer/storage/durable.py` makes the link to it."""
    if not config.buffer.ledger_dir:
        return RunPaths.of(config).ledger_of(shard)
    return Path(config.buffer.ledger_dir).expanduser().resolve() / config.name / shard.ledger


def open_ledger(directory: Path) -> sqlite3.Connection:
    """A connection that only reads; buffers may write meanwhile. Raises sqlite3.DatabaseError.

    A file of an earlier release has the tables and columns of the newest schema: empty temporary tables, and
    views whose names hide those of the file.
    """
    path = (directory / LEDGER_FILE).absolute().as_uri()
    connection = sqlite3.connect(f"{path}?mode=ro", uri=True, timeout=10, isolation_level=None)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version:
            connection.execute("PRAGMA temp_store = MEMORY")
            scripts = [f"CREATE TEMP TABLE {table}" for since, table in _ADDED_TABLES if since > version]
            for table, columns in _ADDED_COLUMNS.items():
                if added := [column for since, column in columns if since > version]:
                    view = f"SELECT *, {', '.join(added)} FROM main.{table}"
                    scripts.append(f"CREATE TEMP VIEW {table} AS {view}")
            connection.executescript(";".join(scripts))
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


@contextmanager
def reading_ledger(directory: Path) -> Iterator[sqlite3.Connection]:
    """Opens a ledger for the block. Raises StoreCorruptError if SQLite cannot read it."""
    try:
        with closing(open_ledger(directory)) as connection:
            yield connection
    except sqlite3.DatabaseError as error:
        raise StoreCorruptError(
            f"{directory / LEDGER_FILE} cannot be read ({error}); it is damaged, or was written by another "
            "release"
        ) from None


def recorded_shards(paths: RunPaths) -> int | None:
    """The number of buffers (`buffer.num_shards`) whose ledgers have tickets of this run; None if none has
    any.

    A ledger without tickets does not count: its buffer was stopped before it issued one.
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
        with closing(open_ledger(directory)) as ledger:
            found = ledger.execute(query).fetchone()
    except sqlite3.Error:  # there is none, or it is damaged or locked: its buffer will report that
        return None
    return None if found is None else int(found[0])


def network_warning(config: Config) -> str:
    """Why the location of the ledger is unsafe; empty if it is safe, or if there is no ledger."""
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


def file_system_of(path: Path, *, mounts: str | None = None) -> str:
    """The type of the file system that holds `path` (`ext4`, `nfs4`); empty if the system does not say.

    `path` need not exist. `mounts`: the text of /proc/self/mountinfo, if it is not to be read.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ""
    found, longest = "", -1
    resolved = path.resolve()
    for line in mounts.splitlines():
        # 36 35 98:0 / /mnt/x rw,noatime master:1 - nfs4 host:/export rw
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")[0]
        if len(fields) < 5 or not kind:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # `>=`, not `>`: the last of several mounts at one path hides the others.
        if resolved.is_relative_to(point) and len(point.parts) >= longest:
            found, longest = kind, len(point.parts)
    return found


def is_network(kind: str) -> bool:
    """True for a file system whose files other machines may change, and for those in user space."""
    return kind in _NETWORK or kind.startswith("fuse.")
