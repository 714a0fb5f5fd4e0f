"""How many threads a forward pass uses on a CPU: those that it was given, and more while cores are idle.

The trainer of a job on one machine computes only when it has a batch. While it waits, its core would be idle.
So the engine looks at the machine's idle time every quarter of a second, and takes or returns cores:

    2 cores, the trainer waits       the engine had 1 core, and 1 was idle             -> 2 threads
    2 cores, the trainer computes    3 threads share 2 cores, the engine has 4/3 of one -> 1 thread

More threads than cores would be far slower than fewer: each product ends when its slowest thread ends.
"""

from __future__ import annotations

from areal_like.cpus import CoreTimes, free_cores

LOOK_EVERY_S = 0.25
_ENOUGH = 0.6
"""Part of a core that has to be free for one more thread. It is above 1/2: two threads
beside another process on two cores get 4/3 of one, and then one thread is returned."""


class ThreadCount:
    """A pure state machine: times in, number of threads out."""

    def __init__(self, *, least: int, most: int) -> None:
        """`least`: threads that it always has. `most`: with all cores idle; the count is fixed if it is not
        above `least`."""
        self.least, self.most = least, max(least, most)
        self.count = least
        self._wanted = least
        """What the last look found."""
        self._seen: CoreTimes | None = None

    @property
    def is_fixed(self) -> bool:
        """True if idle cores change nothing."""
        return self.most == self.least

    def is_due(self, now_s: float) -> bool:
        """True if the times should be looked at; `now_s`: of the clock of `CoreTimes.at_s`."""
        return not self.is_fixed and (self._seen is None or now_s - self._seen.at_s >= LOOK_EVERY_S)

    def look(self, times: CoreTimes) -> int:
        """Returns the number of threads from now on."""
        if self._seen is not None:
            free = free_cores(self._seen, times)
            wanted = min(max(int(free + 1 - _ENOUGH), self.least), self.most)
            # Fewer at once, more only if they were free the last time too: a step with one thread too many
            # takes several times as long.
            self.count = wanted if wanted <= self.count else max(self.count, min(wanted, self._wanted))
            self._wanted = wanted
        self._seen = times
        return self.count
