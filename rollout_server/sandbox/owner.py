"""Who a sandbox belongs to: a run and one of its rollout servers, as `RUN/SERVER`.

A rollout server writes the owner into its environment, which its workers inherit. Kinds of sandboxes that
may outlive the process that opened them are marked with it. The next start of the server, and
`areal-like reap`, remove what has the mark: no worker of an earlier server is alive by then. A run is a
random id in its directory and not the directory's path, because a remote service sees many machines' runs.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

_VARIABLE = "AREAL_LIKE_SANDBOX_OWNER"
NO_OWNER = "none/none"
"""The owner of sandboxes that no run has opened, such as those of a test."""


def set_owner(run: str, server: str) -> str:
    """Makes this process and those that it starts own the sandboxes they open; returns the owner."""
    os.environ[_VARIABLE] = f"{run}/{server}"
    return os.environ[_VARIABLE]


def owner() -> str:
    """Returns the owner of the sandboxes that this process opens."""
    return os.environ.get(_VARIABLE, NO_OWNER)


def tag_of(name: str) -> str:
    """Returns a short name of an owner for the name of a file."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def id_of_run(file: Path) -> str:
    """Returns the id of a run, in `file` of its directory; creates it if there is none. Raises OSError."""
    if not file.exists():
        own = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
        own.write_text(secrets.token_hex(8))
        try:
            os.link(own, file)
        except FileExistsError:  # another server of the run was first
            pass
        finally:
            own.unlink()
    return file.read_text().strip()
