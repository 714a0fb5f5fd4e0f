"""A cache of a service's replies on disk, keyed by request: one SQLite file for all processes of a user.

A repeated run sends no requests and gets the same rewards. Only replies that were used are kept. If the cache
does not work (a full disk, a broken file), no samples are lost: that is logged once, and the service asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_like.paths import cache_dir

log = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 5.0
NO_CACHE = "none"
"""Name of no cache."""


def cache_of(setting: str, *, default: str) -> ReplyCache | None:
    """Returns the cache that `task.reward.cache` names; None for `none`. `default`: name of the file in the
    cache directory that an empty setting means."""
    if setting == NO_CACHE:
        return None
    return ReplyCache(Path(setting).expanduser() if setting else cache_dir() / default)


def key_of(url: str, body: Mapping[str, Any]) -> bytes:
    """Returns a 32-byte hash of the request and its URL."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).digest()


class ReplyCache:
    """Maps keys to replies. Safe for several threads and processes. Methods block on disk access."""

    def __init__(self, file: Path) -> None:
        """The file and its directory are created on first use."""
        self._file = file
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._has_failed = False

    def get(self, key: bytes) -> str | None:
        """Returns the reply stored under `key`."""
        row = self._execute("SELECT reply FROM replies WHERE key = ?", key)
        return str(row[0]) if row else None

    def put(self, key: bytes, reply: str) -> None:
        """Stores a reply; of two for the same key, the first is kept."""
        self._execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", key, reply)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _execute(self, statement: str, *values: Any) -> Any:
        with self._lock:
            try:
                self._connection = self._connection or self._opened()
                return self._connection.execute(statement, values).fetchone()
            except (sqlite3.Error, OSError) as error:
                if not self._has_failed:
                    log.warning("the cache %s does not work: %s", self._file, error)
                self._has_failed = True
                return None

    def _opened(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self._file, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
            )
        except sqlite3.Error:
            connection.close()
            raise
        weakref.finalize(self, connection.close)  # of a cache that nobody closes
        return connection
