"""Splits a job over several buffer daemons (`buffer.num_shards`) by one numbering rule.

Prompts, tickets, leases and the groups of a step are numbered over the whole job. With n shards, number x
belongs to shard x mod n, which counts it as its number x div n. So a shard issues tickets without
coordination, every process can compute the shard of a number, the groups of a step are spread as evenly as
possible, and a job with one shard has the same numbers as an unsharded one.

Left out: moving anything between shards. The number of shards is fixed for the whole run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from areal_like.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the `count` buffer daemons of a job."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count

    @classmethod
    def of(cls, number: int, *, count: int) -> Self:
        return cls(number % count, count)

    @classmethod
    def named(cls, name: str, *, count: int) -> Self:
        """The shard of the daemon with this name. Raises ConfigError if no shard has this name."""
        if count == 1:
            return cls()
        names = [cls(index, count).name for index in range(count)]
        if name not in names:
            raise ConfigError(
                f"buffer.num_shards={count}: name the shard with --name {' or '.join(names)} (not {name})"
            )
        return cls(names.index(name), count)

    @property
    def name(self) -> str:
        """Name of the shard's daemon: `buffer`, or `buffer-1` if there are several shards."""
        return self._numbered("buffer")

    @property
    def ledger(self) -> str:
        """Name of its ledger in the run's directory: `ledger`, or `ledger-1` if there are several shards."""
        return self._numbered("ledger")

    def owns(self, number: int) -> bool:
        return number % self.count == self.index

    def number(self, local: int) -> int:
        """The job-wide number of this shard's number `local`."""
        return local * self.count + self.index

    def local(self, number: int) -> int:
        """This shard's number of the job-wide `number`, which must belong to it."""
        assert self.owns(number), f"{number} does not belong to shard {self.index} of {self.count}"
        return number // self.count

    def share(self, total: int) -> int:
        """Number of integers in 0..total-1 that belong to this shard.

        This is total / count, rounded up for the first shards and down for the others.
        """
        return (total - self.index + self.count - 1) // self.count

    def _numbered(self, word: str) -> str:
        return word if self.count == 1 else f"{word}-{self.index}"


WHOLE = Shard()
"""The only shard of an unsharded job."""


def all_shards(count: int) -> Sequence[Shard]:
    """Every shard of a job, in order."""
    return [Shard(index, count) for index in range(count)]


def add_up(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum of the shards' counts, by name."""
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)
