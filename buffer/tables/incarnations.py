"""Refuses messages of replaced processes: stores the newest incarnation of every peer, also over restarts.

An incarnation is a number that grows with every start of a process of the same name. A message with an older
incarnation comes from a process that has been replaced (it hung, or its machine was cut off), and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from areal_like.errors import StaleIncarnationError
from buffer.storage.base import Store

_PREFIX = "incarnation:"


def refuse_older(name: str, incarnation: int, *, newest: int) -> None:
    """Raises StaleIncarnationError if `incarnation` is older than `newest`."""
    if incarnation < newest:
        raise StaleIncarnationError(
            f"{name} was started again: incarnation {newest} is newer than {incarnation}"
        )


class IncarnationTable:
    """The newest incarnation of each peer, by the peer's name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.newest: dict[str, int] = {}

    def restore(self, scalars: Mapping[str, int]) -> None:
        """Reads the incarnations that earlier buffers wrote."""
        self.newest = {
            name.removeprefix(_PREFIX): value for name, value in scalars.items() if name.startswith(_PREFIX)
        }

    def check(self, name: str, incarnation: int) -> None:
        """Raises StaleIncarnationError if a newer process of this name has registered."""
        refuse_older(name, incarnation, newest=self.newest.get(name, 0))

    def register(self, name: str, incarnation: int) -> None:
        """Stores an incarnation if it is the newest. Raises StaleIncarnationError if it is older."""
        self.check(name, incarnation)
        if incarnation > self.newest.get(name, 0):
            self.newest[name] = incarnation
            self._store.put_scalar(f"{_PREFIX}{name}", incarnation)
