"""How a job is split over several buffers (`buffer.num_shards`): one rule for everything that is numbered.

Prompts, tickets, leases and the places of a step are numbered over the whole job. Number x belongs to shard x mod n, which counts its own
by x div n. So a shard needs nobody's leave to issue a ticket, whoever sees a number knows whom to ask, a step's places are dealt out as
evenly as they can be, and with one shard every number is what it would be without any. Left out: moving anything from one shard to another;
the number of shards is that of a run for life.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from areal_like.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` buffers."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count

    @classmethod
    def of(cls, number: int, *, count: int) -> Self:
        """The shard that a number belongs to."""
        return cls(number % count, count)

    @classmethod
    def named(cls, name: str, *, count: int) -> Self:
        """The shard that a daemon of this name is. Raises ConfigError when its name does not say."""
        if count == 1:
            return cls()
        names = [cls(index, count).name for index in range(count)]
        if name not in names:
            raise ConfigError(
                f"buffer.num_shards={count}: say which of them this is, --name {' or '.join(names)} (not {name})"
            )
        return cls(names.index(name), count)

    @property
    def name(self) -> str:
        """Of its daemon: `buffer`, or `buffer-1` of several."""
        return self._of_several("buffer")

    @property
    def ledger(self) -> str:
        """Of its directory in the run's: `ledger`, or `ledger-1` of several."""
        return self._of_several("ledger")

    def owns(self, number: int) -> bool:
        """Whether a number belongs to this shard."""
        return number % self.count == self.index

    def number(self, local: int) -> int:
        """The number, over the whole job, of what this shard counts as `local`."""
        return local * self.count + self.index

    def local(self, number: int) -> int:
        """What this shard counts a number of its own as."""
        assert self.owns(number), f"{number} is not of shard {self.index} of {self.count}"
        return number // self.count

    def share(self, total: int) -> int:
        """How many of the numbers 0..total-1 are its own: total / count, rounded up for the first shards and down for the others."""
        return (total - self.index + self.count - 1) // self.count

    def _of_several(self, what: str) -> str:
        return what if self.count == 1 else f"{what}-{self.index}"


WHOLE = Shard()
"""The only one."""


def all_shards(count: int) -> Sequence[Shard]:
    """Every shard of a job, in order."""
    return [Shard(index, count) for index in range(count)]


def add_up(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """What every shard has counted, by name."""
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)
