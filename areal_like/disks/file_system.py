"""What file system a directory is on: SQLite's WAL is only safe on a local one.

In WAL mode all processes that use a ledger share memory through the file `ledger.sqlite3-shm`. Over a network
two machines have two copies of it, and some network file systems have no locks either.
"""

from __future__ import annotations

import re
from pathlib import Path

_NETWORK = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4"),
        *("ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
    }
)
"""Types of network and cluster file systems, as the kernel names them."""


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
        # Not `>`: the last of several mounts at one place hides the others.
        if resolved.is_relative_to(point) and len(point.parts) >= longest:
            found, longest = kind, len(point.parts)
    return found


def is_network(kind: str) -> bool:
    """True for a file system whose files other machines may change, and for those in user space."""
    return kind in _NETWORK or kind.startswith("fuse.")
