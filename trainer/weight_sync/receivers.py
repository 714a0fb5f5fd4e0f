"""The servers that a push may go to: a link to each, and who is left out for a while.

Left out is who failed, for `first_s`, twice as long after each failure more, or until the directory says something new of it (a restart,
another state or version): a bad engine costs a deadline now and then and not one a push, and a healthy one that was slow
once is not lost for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ArealError
from areal_like.wire.channel import Link
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import Alive, WeightsFailed, WeightsOk

Key = tuple[str, int]
"""Name and incarnation of a server."""
Answer = Alive | WeightsOk | WeightsFailed


def key_of(entry: ServerEntry) -> Key:
    """What tells one life of a server from another."""
    return entry.name, entry.incarnation


@dataclass(frozen=True, kw_only=True)
class Member:
    """One server and the link to its weight socket."""

    entry: ServerEntry
    link: Link

    @property
    def key(self) -> Key:
        """See `key_of`."""
        return key_of(self.entry)

    async def ask(self, request: Any, *, timeout_s: float) -> Answer:
        """Its answer; silence and refusals become WeightsFailed."""
        try:
            answer = await self.link.call(request, timeout_s=timeout_s)
        except ArealError as error:
            return WeightsFailed(version=-1, reason=str(error))
        if not isinstance(answer, (Alive, WeightsOk, WeightsFailed)):
            return WeightsFailed(
                version=-1, reason=f"answered {type(answer).__name__} to {type(request).__name__}"
            )
        return answer


@dataclass(frozen=True, kw_only=True)
class _Shunned:
    entry: ServerEntry
    """What the directory said of it when it failed."""
    for_s: float
    until_s: float


class ReceiverBackoff:
    """Who is left out. Pure: times are seconds on any one monotonic clock."""

    def __init__(self, *, first_s: float = 5.0, max_s: float = 300.0) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._shunned: dict[Key, _Shunned] = {}

    def is_eligible(self, entry: ServerEntry, *, now_s: float) -> bool:
        """Whether a push goes to this server of the directory."""
        if not entry.weights_address or entry.state in ("starting", "draining"):
            return False
        shunned = self._shunned.get(key_of(entry))
        if shunned is None or now_s >= shunned.until_s:
            return True
        return (shunned.entry.state, shunned.entry.weights_version) != (entry.state, entry.weights_version)

    def failed(self, entry: ServerEntry, *, now_s: float) -> None:
        """A server did not do its part."""
        before = self._shunned.get(key_of(entry))
        for_s = min(self._max_s, 2 * before.for_s) if before else self._first_s
        self._shunned[key_of(entry)] = _Shunned(entry=entry, for_s=for_s, until_s=now_s + for_s)

    def succeeded(self, key: Key) -> None:
        """A server has new weights active."""
        self._shunned.pop(key, None)

    def forget_all_but(self, keys: Iterable[Key]) -> None:
        """Only these are in the directory."""
        kept = set(keys)
        self._shunned = {key: shunned for key, shunned in self._shunned.items() if key in kept}
