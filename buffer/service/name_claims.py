"""Decides which of two live processes keeps a name: the one that responds under it. Pure: no sockets, no
clock.

    (name taken by another process) --begin--> asked --heard from the holder--> refused
                                                 `--ANSWER_S over-----------> admitted, the holder is replaced

A newcomer under the name of a connected process is either its successor (the holder hangs, or its machine is
cut off), a mistake or an intruder. Neither clocks nor numbers that a peer sends can distinguish these cases,
so a holder that responds keeps the name. The daemon sends the queries; a holder whose connection is gone is
not queried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from areal_like.security.keys import AllowedKey
from areal_like.wire.messages.hello import Hello

ANSWER_S = 2.0
"""Seconds for the holder to respond. It sends heartbeats more often than that while it works."""
MAX_WAITING = 64
"""Maximum number of newcomers that wait for one name; further ones are refused at once."""


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A process that waits for the decision."""

    route: bytes
    rid: int
    hello: Hello
    key: AllowedKey | None = None
    """The key with which it connected; None without keys."""


@dataclass(kw_only=True)
class _Question:
    holders: frozenset[bytes]
    """Routes that were queried."""
    until_s: float
    newcomers: dict[bytes, Newcomer] = field(default_factory=dict)


class NameClaims:
    """Pending queries to the holders of names. Times are seconds on any one clock."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    def is_asked(self, name: str) -> bool:
        """True while the holder of this name has time to respond."""
        return name in self._questions

    def begin(self, name: str, holders: Collection[bytes], *, now_s: float) -> None:
        """Records that the holders of the name were queried."""
        self._questions[name] = _Question(holders=frozenset(holders), until_s=now_s + ANSWER_S)

    def wait(self, name: str, newcomer: Newcomer) -> bool:
        """Adds a newcomer to the query about its name; a repeated hello replaces the previous one.

        Returns False if too many wait.
        """
        newcomers = self._questions[name].newcomers
        if len(newcomers) >= MAX_WAITING and newcomer.route not in newcomers:
            return False
        newcomers[newcomer.route] = newcomer
        return True

    def heard(self, route: bytes) -> list[Newcomer]:
        """Records a message on this route; returns the newcomers to refuse."""
        if not self._questions:  # every message passes here
            return []
        names = [name for name, question in self._questions.items() if route in question.holders]
        return [newcomer for name in names for newcomer in self._questions.pop(name).newcomers.values()]

    def cancel(self, name: str) -> list[Newcomer]:
        """Ends the query about a name; returns its newcomers."""
        question = self._questions.pop(name, None)
        return list(question.newcomers.values()) if question else []

    def expired(self, *, now_s: float) -> Iterator[tuple[str, list[Newcomer]]]:
        """The names whose holders have not responded in time, with their newcomers in order of arrival."""
        for name in [name for name, question in self._questions.items() if question.until_s <= now_s]:
            yield name, list(self._questions.pop(name).newcomers.values())
