"""Finds the program that holds the ledger's write lock, for the message to the operator. Linux only.

In WAL mode the write lock of SQLite is a lock of byte 120 of the file `ledger.sqlite3-shm`, and the kernel
lists all locks with their processes in /proc/locks. SQLite itself only says that the database is locked.
"""

from __future__ import annotations

import os
from pathlib import Path

_WRITE_LOCK = "120"


def lock_holder(database: Path, *, locks: str | None = None) -> str:
    """`pid 4711 (sqlite3)`; empty if the system does not say who it is.

    `locks`: the text of /proc/locks, if it is not to be read.
    """
    try:
        inode = database.with_name(f"{database.name}-shm").stat().st_ino
        lines = (Path("/proc/locks").read_text() if locks is None else locks).splitlines()
    except OSError:
        return ""
    for line in lines:
        # 2: POSIX  ADVISORY  WRITE 30841 fe:00:2335239 120 120; `->` marks those who wait for the one above.
        fields = line.split()
        if len(fields) != 8 or fields[1] != "POSIX" or fields[3] != "WRITE" or fields[6] != _WRITE_LOCK:
            continue
        pid = int(fields[4])
        if fields[5].rpartition(":")[2] == str(inode) and pid not in (0, os.getpid()):
            return f"pid {pid}{_name_of(pid)}"
    return ""


def _name_of(pid: int) -> str:
    try:
        return f" ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return ""
