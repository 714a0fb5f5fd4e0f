"""Distinguishes the newest process of each name from those that it replaced, also across restarts of the
buffer.

    unknown name --admit(P)--> P has it, incarnation 1 --admit(Q)--> Q has it, incarnation 2
                                    `--unfence--> it is free, incarnation 2 --admit(R)--> R, incarnation 3

Every process has a random identity. The ledger gives each new process of a name the next number, and keeps
both, so clocks play no part, and nothing that a peer sends can raise a number. Whether a new process may take
a name that another one holds is decided elsewhere (`buffer/service/registration.py`).

All ranks of the trainer are one process here, under the name TRAINER. Only 63 bits of an identity's hash are
stored, so a reader of the ledger does not learn the identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from areal_like.errors import RefusedError, StaleIncarnationError
from buffer.storage.base import Store

TRAINER = "trainer"
"""The name of all trainer ranks together."""
MAX_NAMES = 1 << 16
"""Maximum number of different names in one run. Each takes a row forever."""
_INCARNATION, _PROCESS = "incarnation:", "process:"
_IMPOSSIBLE = 1 << 62
"""Releases that took incarnations from the clock stored the number that a peer sent. No clock reaches this
number."""


class IncarnationTable:
    """The newest incarnation of each name, and the process that holds it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._newest: dict[str, int] = {}
        self._process: dict[str, int] = {}

    def restore(self, scalars: Mapping[str, int]) -> None:
        """Reads what earlier buffers wrote. Older releases wrote one number for each rank of the trainer."""
        for key, value in scalars.items():
            if key.startswith(_INCARNATION):
                name = key.removeprefix(_INCARNATION)
                name = TRAINER if name.startswith(f"{TRAINER}-") else name
                self._newest[name] = max(self._newest.get(name, 0), value)
            elif key.startswith(_PROCESS):
                self._process[key.removeprefix(_PROCESS)] = value

    def __contains__(self, name: str) -> bool:
        """True if a process has ever had the name."""
        return name in self._newest

    def find(self, name: str, process: str, incarnation: int) -> int:
        """The incarnation of a process that holds the name; 0 if the process is new.

        `incarnation`: the one that the process says it was granted; 0: none. Raises StaleIncarnationError if
        another process has the name since then.
        """
        newest = self._newest.get(name, 0)
        if newest and self._process.get(name) == _digest(process):
            return newest
        # A number above the newest was granted by a buffer that died before it had written it.
        if 0 < incarnation <= newest:
            raise StaleIncarnationError(
                f"{name} was replaced by another process: its incarnation is {incarnation}, "
                f"the newest is {newest}"
            )
        return 0

    def admit(self, name: str, process: str, *, above: int = 0) -> int:
        """Gives the name to a new process; returns its incarnation, which is also larger than `above`.

        Raises RefusedError for too many names, and for a number that a forged hello has left in the ledger of
        an earlier release.
        """
        newest = max(self._newest.get(name, 0), above)
        if newest >= _IMPOSSIBLE:
            raise RefusedError(
                "incarnation",
                f"the ledger has the impossible number {newest} for {name}: "
                f"run `areal-like unfence RUN {name}`",
            )
        if name not in self._newest and len(self._newest) >= MAX_NAMES:
            raise RefusedError("peers", f"this run has had {MAX_NAMES} names: use one of them again")
        self._put(name, newest + 1, _digest(process))
        return newest + 1

    def unfence(self, name: str, *, floor: int = 0) -> tuple[int, int]:
        """Takes the name from the process that holds it; returns the (earlier, new) newest incarnation.

        The process is refused from now on, and the next new one gets the name. An impossible number is
        replaced by `floor`, the largest that the ledger has used.
        """
        before = self._newest.get(name, 0)
        after = floor if before >= _IMPOSSIBLE else before + 1
        self._put(name, after, 0)
        return before, after

    def _put(self, name: str, incarnation: int, process: int) -> None:
        self._newest[name], self._process[name] = incarnation, process
        self._store.put_scalar(f"{_INCARNATION}{name}", incarnation)
        self._store.put_scalar(f"{_PROCESS}{name}", process)


def is_impossible(incarnation: int) -> bool:
    """True for a number that no buffer has granted and no clock has shown."""
    return incarnation >= _IMPOSSIBLE


def _digest(process: str) -> int:
    """63 bits of the identity's hash, never 0."""
    return (int.from_bytes(hashlib.sha256(process.encode()).digest()[:8], "big") >> 1) or 1
