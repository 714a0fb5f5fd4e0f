"""The result of an audit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

_NUM_SHOWN = 10
"""Offenders of one check in the table; --json has all."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    text: str
    """The statement that was checked."""
    num_checked: int
    offenders: list[str]
    """Texts about the rows that contradict the statement, each with the ids of its row."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of all checks of a run, or of one of its ledgers."""

    run: str
    checks: list[Check]
    tickets: dict[str, int]
    """State, or `issued` -> number of tickets."""
    drops: dict[str, int]
    """Reason -> number of dropped tickets."""
    failures: dict[str, int] = field(default_factory=dict)
    """Kind and outcome, such as `reward_timeout zero` -> number of failed samples."""
    promise: str = ""
    """What the run's settings promise about the age of what is trained on; empty for one ledger."""
    facts: dict[str, int] = field(default_factory=dict)
    """Numbers of committed steps, versions, rollbacks, tokens rolled back, and bytes of trajectories."""

    @property
    def is_clean(self) -> bool:
        """True when no check has offenders."""
        return not any(check.offenders for check in self.checks)

    def dumps(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self) | {"clean": self.is_clean}, indent=2)

    def lines(self) -> Iterator[str]:
        """The result as a short table."""
        for check in self.checks:
            yield f"{'FAILED' if check.offenders else 'ok':>6}  {check.num_checked:>11,}  {check.text}"
            yield from (f"{'':>21}{offender}" for offender in check.offenders[:_NUM_SHOWN])
            if len(check.offenders) > _NUM_SHOWN:
                yield f"{'':>21}and {len(check.offenders) - _NUM_SHOWN:,} more (--json lists all)"
        if self.promise:
            yield f"bound    {self.promise}"
        yield "tickets  " + "  ".join(f"{state} {count:,}" for state, count in self.tickets.items() if count)
        if self.drops:
            yield "dropped  " + "  ".join(f"{reason} {count:,}" for reason, count in self.drops.items())
        if self.failures:
            yield "failed   " + "  ".join(f"{kind} {count:,}" for kind, count in self.failures.items())
        yield "  ".join(f"{name} {value:,}" for name, value in self.facts.items())
