"""How old a group may be when it is recorded: the one rule that admission and recording share.

    deadline(step of the oldest token) = that step + max_staleness, and never beyond the sync interval that the step belongs to

A ticket keeps the bound it was issued under. So the bound may change at any time without wasting work: lowering it closes admission until
what was admitted before is through, and no ticket that was on time becomes late. Admission still proves that every deadline can be met:
whenever a ticket is issued, everything recorded, ready and running fits into the steps up to that ticket's deadline.

Intervals (`weights.sync_interval` I > 1 with `buffer.group_filter: single_version`): engines get new weights every I steps, no group may
mix two of them, and every interval is trained on its own groups. Steps nI..(n+1)I-1 take what was sampled with weights of those steps, so
interval n admits at most (n+1) * I * groups_per_step groups since the run began, replacements of dropped ones included.
"""

from __future__ import annotations


class StalenessBound:
    """The bound now, and the arithmetic of deadlines. Pure."""

    def __init__(self, max_staleness: int, *, sync_interval: int) -> None:
        """`sync_interval`: steps of one interval; 1: there are none."""
        self.max_staleness = max_staleness
        """Of tickets issued from now on."""
        self._sync_interval = sync_interval

    def deadline(self, floor: int, *, max_staleness: int) -> int:
        """The last step that may record a group whose oldest token is at step `floor`, of a ticket issued under this bound."""
        last = floor + max_staleness
        if self._sync_interval > 1:
            last = min(last, floor - floor % self._sync_interval + self._sync_interval - 1)
        return last
