"""The offset of this process's clock against the buffer's, from the round trips of heartbeats. Pure.

A heartbeat carries the sender's time, and its reply both that time and the buffer's. If both directions take
equally long, the buffer's time was read in the middle of the round trip; the error is at most half of it. So
the estimate comes from the shortest of the last round trips (as in NTP's clock filter, RFC 5905, section 10).
"""

from __future__ import annotations

import math
from collections import deque

_NUM_KEPT = 32


class ClockOffset:
    """The estimate; (offset, round trip) of the last heartbeats."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_NUM_KEPT)

    def heard(self, *, sent_s: float, buffer_s: float, now_s: float) -> tuple[float, float] | None:
        """(seconds to add to this process's times, round trip), or None if the reply has no usable times.

        `sent_s`, `now_s`: by this process; `buffer_s`: by the buffer, which is not trusted to be a number.
        """
        rtt_s = now_s - sent_s
        if not (math.isfinite(buffer_s) and math.isfinite(sent_s) and buffer_s > 0 and 0 <= rtt_s < 60):
            return None
        self._samples.append((rtt_s, buffer_s - (sent_s + now_s) / 2))
        rtt_s, offset_s = min(self._samples, key=lambda one: one[0])
        return offset_s, rtt_s
