"""Reads the results of each training prompt from a run's ledgers, for `areal-like data stats RUN`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from areal_like.ledger_place import reading_ledger

# A position of parts of closed groups is a ticket without a prompt.
_ISSUED = (
    "SELECT prompt_index, count(*) FROM tickets WHERE purpose = 'train' AND prompt_index >= 0 "
    "GROUP BY prompt_index"
)
_RATE = "min(max((reward - :low) / (:high - :low), 0.0), 1.0)"
# Greedy baselines are the last samples of their ticket. They are left out here and in a curriculum.
_HEARD = f"""
SELECT prompt_index, count(*), sum(rate = 0.0), sum(rate = 1.0), sum(rate)
FROM (
    SELECT prompt_index, {_RATE} AS rate FROM tickets JOIN samples USING (ticket_id)
    WHERE purpose = 'train' AND sample_index < num_samples - num_greedy
)
GROUP BY prompt_index
"""


@dataclass(frozen=True, kw_only=True)
class HeardPrompts:
    """The results of all prompts, from all ledgers of a run."""

    num_drawn: int
    """Prompts drawn from the epochs; a curriculum issues only some of them."""
    rows: list[tuple[float, ...]]
    """(prompt index, tickets, samples, samples with solve rate 0, with solve rate 1, sum of the solve rates),
    ascending."""


def read_heard_prompts(ledgers: Iterable[Path], *, reward_low: float, reward_high: float) -> HeardPrompts:
    """Reads the ledgers in these directories, each in one transaction; the job may be running.

    A reward of `reward_low` or less is a solve rate of 0, one of `reward_high` or more is 1. Raises
    StoreCorruptError when SQLite cannot read a ledger.
    """
    issued: Counter[int] = Counter()
    heard: dict[int, tuple[float, ...]] = {}
    num_drawn = 0
    for directory in ledgers:
        with reading_ledger(directory) as ledger:
            ledger.execute("BEGIN")
            issued.update(dict(ledger.execute(_ISSUED)))
            rates = {"low": reward_low, "high": reward_high}
            # A prompt belongs to one shard, so no ledger has rows of another one's prompts.
            heard |= {row[0]: row[1:] for row in ledger.execute(_HEARD, rates)}
            cursor = ledger.execute("SELECT value FROM marks WHERE name = 'cursor'").fetchone()
            num_drawn += cursor[0] if cursor else 0
    nothing = (0, 0, 0, 0.0)
    return HeardPrompts(
        num_drawn=num_drawn,
        rows=[(index, count, *heard.get(index, nothing)) for index, count in sorted(issued.items())],
    )
