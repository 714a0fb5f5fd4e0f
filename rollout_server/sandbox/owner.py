"""Who a sandbox belongs to: a run, and one of its rollout servers.

A rollout server writes the owner into its environment, which its workers inherit. Kinds of sandboxes that
may outlive the process that opened them are marked with it. The next start of the server, and
`areal-like reap`, remove what has the mark: no worker of an earlier server is alive by then. A run is a
random id in its directory and not the directory's path, because a remote service sees many machines' runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

_VARIABLE = "AREAL_LIKE_SANDBOX_OWNER"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A rollout server of a run, or all of them."""

    run: str = "none"
    """Id of the run; `none`: no run, such as a test."""
    server: str = ""
    """Name of the server; empty: all servers of the run."""

    @classmethod
    def of_this_process(cls) -> Owner:
        """Returns the owner of the sandboxes that this process opens."""
        run, _, server = os.environ.get(_VARIABLE, "").partition("/")
        return cls(run=run, server=server) if run else cls()

    def adopt(self) -> None:
        """Makes this process and those that it starts from now on open sandboxes of this owner."""
        os.environ[_VARIABLE] = f"{self.run}/{self.server}"

    @property
    def marks(self) -> dict[str, str]:
        """Returns the labels of what belongs to it: those of a server include those of its run."""
        marks = {"areal-like.run": self.run}
        return marks | {"areal-like.server": self.server} if self.server else marks

    @property
    def prefix(self) -> str:
        """Returns the beginning of the names of its files."""
        server = hashlib.sha256(self.server.encode()).hexdigest()[:12] + "-" if self.server else ""
        return f"areal-like-program-{self.run}-{server}"


def id_of_run(file: Path) -> str:
    """Returns the id of a run, in `file` of its directory; creates it if there is none. Raises OSError."""
    if not file.exists():
        own = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
        own.write_text(secrets.token_hex(8))
        with contextlib.suppress(FileExistsError):  # another server of the run was first
            os.link(own, file)
        own.unlink()
    return file.read_text().strip()
