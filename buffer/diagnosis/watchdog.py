"""Examines the job once a second: who waits on whom, for /status, the log and Prometheus. Pure: no clock."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Any

from areal_like.runtime.metrics import Metrics
from buffer.diagnosis.bottleneck import PoolTotals, Utilisation, advice
from buffer.diagnosis.facts import Cause, JobFacts, On, PeerFacts, WaitLimits
from buffer.diagnosis.rules import causes_of, effects_of, late_servers
from buffer.diagnosis.speeds import Speeds

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
_LATE_S = 1.0
"""A watchdog that is later than this was not running: the job only seemed silent because nothing was
received."""


class Wakefulness:
    """Tracks since when the buffer has run without a gap. A process that was stopped must not mistake others
    for silent."""

    def __init__(self, *, now_s: float) -> None:
        self._due_s = now_s
        self.awake_since_s = now_s
        self.late_s = 0.0
        """Mean delay of the timer over the last seconds."""

    def tick(self, *, now_s: float, next_s: float) -> None:
        """Call it when the timer fires; `next_s`: when it will fire next."""
        late_s = max(0.0, now_s - self._due_s)
        self.late_s += 0.1 * (min(late_s, 4.0) - self.late_s)  # one long gap alone stays below 0.5
        if late_s > _LATE_S:
            self.awake_since_s = now_s
        self._due_s = next_s

    def silent_s(self, heard_s: float, *, now_s: float) -> float:
        """Seconds in which a peer sent nothing while the buffer was able to receive."""
        return max(0.0, now_s - max(heard_s, self.awake_since_s))


class Watchdog:
    """The diagnosis of one job, renewed by `look`."""

    def __init__(self, metrics: Metrics, *, limits: WaitLimits) -> None:
        self._limits = limits
        self._speeds = Speeds()
        self._late_since_s: dict[str, float] = {}
        self._utilisation = Utilisation()
        self._waiting = metrics.gauge(
            "waiting_seconds",
            "Longest time for which the job waits on something that should not take so long; 0: on nothing",
            label="on",
            values=list(On),
        )
        self._blocked_at_s = -math.inf
        """When the buffer could not write for the last time."""
        self._told: set[str] = set()
        self._causes: list[Cause] = []
        self._effects: list[str] = []
        self._max_staleness = 0
        self._facts = JobFacts()

    def look(self, facts: JobFacts, *, load: PoolTotals, max_staleness: int) -> None:
        """Updates the diagnosis from the current facts."""
        self._max_staleness = max_staleness
        self._facts = facts
        for server in facts.servers:
            if server.longest_wait("engine")[1]:
                self._speeds.forget_window(server.name)
                continue
            self._observe(server, "tokens_generated", "at_engine_s", "requests_s", now_s=load.at_s)
        for rank in facts.ranks:  # only rank 0 counts, and all ranks are as slow as the slowest
            self._observe(rank, "row_step", "busy_s", "busy_s", now_s=load.at_s)
        self._speeds.keep_only({peer.name: None for peer in (*facts.servers, *facts.ranks)})
        self._utilisation.observe(load)
        self._late_since_s = {name: self._late_since_s.get(name, load.at_s) for name in late_servers(facts)}
        # A complete stall is detected within this time, and makes others late.
        late = [
            name
            for name, since_s in self._late_since_s.items()
            if load.at_s - since_s >= 2 * self._limits.stall_s
        ]
        self._causes = causes_of(facts, slow=self._speeds.slow(), late=late, limits=self._limits)
        if facts.store_trouble:
            self._blocked_at_s = load.at_s
        elif load.at_s - self._blocked_at_s < self._limits.stall_s:
            # The peers' last heartbeats still report waits for the buffer's disk.
            self._causes = [cause for cause in self._causes if cause.on is On.BUFFER]
        self._effects = effects_of(facts, limits=self._limits) if self._causes else []
        longest = dict.fromkeys(On, 0.0)
        for cause in self._causes:
            longest[cause.on] = max(longest[cause.on], cause.seconds)
        for on, seconds in longest.items():
            self._waiting.labels(on.value).set(seconds)
        self._tell()

    def report(self) -> dict[str, Any]:
        """`why` in /status: `causes` (on, name, seconds, what, remedy), `effects`, `bottleneck`, shares."""
        return {
            "causes": [asdict(cause) | {"on": cause.on.value} for cause in self._causes],
            "effects": self._effects,
            "bottleneck": ""
            if self._causes
            else advice(self._utilisation, max_staleness=self._max_staleness, facts=self._facts),
            "trainer_idle": self._utilisation.trainer_idle,
            "generation_idle": self._utilisation.generation_idle,
        }

    def _observe(self, peer: PeerFacts, work: str, busy: str, added: str, *, now_s: float) -> None:
        if {work, busy, added} <= peer.stats.keys():
            totals = {"work": peer.stats[work], "busy_s": peer.stats[busy], "added_s": peer.stats[added]}
            self._speeds.observe(peer.name, **totals, now_s=now_s)

    def _tell(self) -> None:
        """Logs a cause when it appears, and when it is gone."""
        now = {cause.name: cause for cause in self._causes}
        for name, cause in now.items():
            if name not in self._told:
                log.warning(
                    "the job waits on %s (%s)", cause, "; ".join(self._effects) or "nothing else waits"
                )
        for name in self._told - now.keys():
            log.warning("the job no longer waits on %s", name)
        self._told = set(now)
