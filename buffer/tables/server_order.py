"""The order in which rollout servers with credit are served: the most free samples first, then by name.

What a server can take depends on the version of its weights, on its free samples, and on whether it holds
leases. So there is one sorted list for each version and kind, and the first server that can take a ticket is
found without examining those that cannot.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Mapping

Place = tuple[int, str]
"""(minus its free samples, its name): the smallest position is served first."""
FRONT: Place = (-sys.maxsize, "")
"""Smaller than every position."""
_Kind = tuple[int, bool]
"""(version of its weights, whether it holds no leases)"""


class ServerOrder:
    """Sorted positions, one list for each kind of server."""

    def __init__(self) -> None:
        self._lists: dict[_Kind, list[Place]] = {}
        self._of_server: dict[str, tuple[_Kind, Place]] = {}

    def put(self, name: str, *, free_samples: int, weights_version: int, is_idle: bool) -> None:
        """Inserts a server at its position; removes it if it has no free samples."""
        kind, place = (weights_version, is_idle), (-free_samples, name)
        if self._of_server.get(name) == (kind, place):
            return
        self.remove(name)
        if free_samples > 0:
            self._of_server[name] = kind, place
            insort(self._lists.setdefault(kind, []), place)

    def remove(self, name: str) -> None:
        if (known := self._of_server.pop(name, None)) is None:
            return
        kind, place = known
        places = self._lists[kind]
        del places[bisect_left(places, place)]
        if not places:
            del self._lists[kind]

    @property
    def versions(self) -> Collection[int]:
        return {version for version, _ in self._lists}

    def first(self, after: Place, needs: Mapping[int, int]) -> Place | None:
        """The first server after a position that can take the samples its kind needs; None if there is none.

        `needs`: weights version -> samples that a server has to take at once; absent: there is no ticket for
        it. An idle server takes more than it has room for, because such a ticket might never be leased
        otherwise.
        """
        found = None
        for version, num_samples in needs.items():
            for is_idle in (False, True):
                places = self._lists.get((version, is_idle), ())
                at = bisect_right(places, after)
                if at < len(places) and (is_idle or -places[at][0] >= num_samples):
                    found = places[at] if found is None else min(found, places[at])
        return found
