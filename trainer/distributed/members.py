"""Tells which ranks of the trainer still live, for the log: torch's errors name no rank.

Each rank adds to a counter of its own in the ranks' store, from a thread, so also while its training thread
waits in a collective. A rank whose counter has stalled is reported: its process was killed or stopped, or its
machine is gone. This module only reports. A rank that waits for a lost one fails by itself, when the
connection breaks or the collective times out; `connections.py` limits the time for a machine that is gone.

Left out: using the buffer's heartbeats. Rank 0's store is used because it needs no further messages, and
because a rank that lost the network to the others may still reach the buffer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.distributed.ranks import RankPhase

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two additions to a rank's counter."""
SILENCE_S = 10.0
"""A rank whose counter has stalled for this time is reported."""
_WITH_COLLECTIVES = ("compute", "reduce", "update", "snapshot of the weights")
"""Phases of `RankPhase` in which a rank may wait for the others, but not for groups or servers."""
_LAST_LOOK_S = 3 * BEAT_S
"""Time for which a rank that failed watches the counters of the others before it ends."""
_TELL_LIMIT_S = 1.0
_ASK_LIMIT_S = 10.0
"""Longest wait for the store: it does not respond if its machine is gone."""


class Liveness:
    """Tells which counters have stalled. Pure."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}
        """Rank -> (its counter, time at which it was first seen)."""
        self._reported: set[int] = set()

    def observe(self, counters: Mapping[int, int], *, now_s: float) -> None:
        for rank, counter in counters.items():
            if rank not in self._seen or self._seen[rank][0] != counter:
                self._seen[rank] = (counter, now_s)

    def silent(self, *, now_s: float, for_s: float) -> list[int]:
        """Ranks whose counters have stalled for `for_s` seconds, ascending."""
        return sorted(rank for rank, (_, since_s) in self._seen.items() if now_s - since_s >= for_s)

    def newly_silent(self, *, now_s: float, for_s: float) -> list[int]:
        """The stalled ranks that an earlier call has not returned, or that made progress in between."""
        silent = set(self.silent(now_s=now_s, for_s=for_s))
        new = silent - self._reported
        self._reported = silent
        return sorted(new)


class Members:
    """The counters of the ranks, in a store that all of them reach.

    STARTED -> watching, in a thread -> failed(): last look -> closed
    """

    def __init__(
        self,
        open_store: Callable[[], Any],
        *,
        names: Sequence[str],
        rank: int,
        place: RankPhase,
        stuck_after_s: float,
    ) -> None:
        """`open_store` connects to torch's store, with keys of this start only. `names`: the names of all
        ranks.

        `stuck_after_s`: a phase with collectives that takes longer is reported.
        """
        self.rank = rank
        self.names = names
        self._open_store = open_store
        self._store = open_store()
        self._place = place
        self._stuck_after_s = stuck_after_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="members", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Call it before the store is closed."""
        self._closing.set()
        self._thread.join(timeout=_ASK_LIMIT_S)

    def failed(self, reason: str, *, end_connections: Callable[[], None]) -> str:
        """Records in the store that this rank has failed; returns a sentence about the cause.

        `end_connections` is called after that, so that this rank counts as failed before the ranks that wait
        for it. It takes `_LAST_LOOK_S`, and `_ASK_LIMIT_S` if the store does not respond.
        """
        answers: list[str] = []
        told = threading.Event()
        # In a thread: torch has no time limit for a store on a machine that is gone.
        asking = threading.Thread(target=lambda: answers.append(self._last_look(reason, told)), daemon=True)
        asking.start()
        told.wait(timeout=_TELL_LIMIT_S)
        end_connections()
        asking.join(timeout=_ASK_LIMIT_S)
        return answers[0] if answers else f"the store of {self.names[0]} does not respond"

    def _last_look(self, reason: str, told: threading.Event) -> str:
        try:
            store = self._open_store()  # the thread's connection may be waiting for a response
            order = store.add("failures", 1)
            store.set(f"failure/{order}", f"{self.names[self.rank]}, at {self._place}: {reason}")
            store.add(f"told/{self.rank}", 1)
            told.set()
            liveness, end_s = Liveness(), time.monotonic() + _LAST_LOOK_S
            while (now_s := time.monotonic()) < end_s:
                liveness.observe(self._counters(store), now_s=now_s)
                time.sleep(BEAT_S / 4)
            silent = liveness.silent(now_s=end_s, for_s=2 * BEAT_S)
            lost = [rank for rank in silent if not store.add(f"told/{rank}", 0)]
            first = store.get("failure/1").decode()
            if self.rank:
                store.add("answered", 1)
            else:
                self._wait_for_others(store, num_others=len(self.names) - len(lost) - 1)
            if lost:
                return f"no response from {self._named(lost)}: stopped or gone"
            return f"the first to fail was {first}" if order > 1 else "it is the first to fail"
        except RuntimeError as error:  # torch's DistError
            return f"the store of {self.names[0]} does not respond ({first_line(error)})"

    def _wait_for_others(self, store: Any, *, num_others: int) -> None:
        """Rank 0's process may serve the store, so it waits until the others have read it."""
        end_s = time.monotonic() + _LAST_LOOK_S
        while store.add("answered", 0) < num_others and time.monotonic() < end_s:
            time.sleep(BEAT_S / 4)

    def _watch(self) -> None:
        liveness, stuck_since_s = Liveness(), -1.0
        try:
            while not self._closing.wait(BEAT_S):
                self._store.add(f"beat/{self.rank}", 1)
                now_s = time.monotonic()
                liveness.observe(self._counters(self._store), now_s=now_s)
                for rank in liveness.newly_silent(now_s=now_s, for_s=SILENCE_S):
                    log.warning(
                        "%s has not responded for %.0f s; this rank is at %s, for %.0f s",
                        self.names[rank],
                        SILENCE_S,
                        self._place,
                        now_s - self._place.since_s,
                    )
                place_s = now_s - self._place.since_s
                is_stuck = self._place.phase in _WITH_COLLECTIVES and place_s > self._stuck_after_s
                # Logged before the time limit: over NCCL torch ends the process without giving us a chance to
                # log.
                if is_stuck and stuck_since_s != self._place.since_s:
                    stuck_since_s = self._place.since_s
                    log.error("%s is at %s for %.0f s", self.names[self.rank], self._place, place_s)
        except RuntimeError as error:  # the store ends with rank 0's process, or its torchrun agent
            if not self._closing.is_set():
                log.info("the ranks' store has ended: %s", first_line(error))

    def _counters(self, store: Any) -> dict[int, int]:
        # `add` of 0 reads the counter: `get` would return it as text.
        return {rank: int(store.add(f"beat/{rank}", 0)) for rank in range(len(self.names))}

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.names[rank] for rank in ranks)


def first_line(error: Exception) -> str:
    """The first sentence of an error's text: torch's errors have many lines, and gloo's add advice."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]
