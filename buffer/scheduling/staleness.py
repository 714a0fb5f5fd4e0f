"""The staleness bound: the last optimizer step in which a group may be trained on.

    deadline = min(step of its oldest token's weights + max_staleness, last step of that step's sync interval)

Admission (admission.py) and recording (step_scheduler.py) share this rule. A ticket keeps the bound under
which its first sample was leased; it is fixed once the ticket has a sample or a lease. So the current bound
may change at any time without wasting work: lowering it closes admission until the earlier tickets are done,
and no ticket that was on time becomes late. Admission still guarantees that every deadline can be met:
whenever a ticket is issued, all recorded, ready and running groups fit into the steps up to that ticket's
deadline.

Sync intervals (`weights.sync_interval` I > 1 with `buffer.group_filter: single_version`): engines get new
weights every I steps, no group may mix two versions, and every interval trains on its own groups. Steps
nI..(n+1)I-1 train on the groups sampled with weights of these steps, so up to interval n at most
(n+1) * I * groups_per_step groups are admitted, including replacements of dropped ones.
"""

from __future__ import annotations


class StalenessBound:
    """The current bound, and the arithmetic of deadlines. Pure."""

    def __init__(self, current: int, *, sync_interval: int) -> None:
        """`sync_interval`: number of steps in one interval; 1: there are no intervals."""
        self.current = current
        """The bound of tickets that start from now on, in optimizer steps."""
        self._sync_interval = sync_interval

    def deadline(self, oldest_step: int, *, max_staleness: int) -> int:
        """The last step that may record a group.

        `oldest_step`: step of its oldest token's weights. `max_staleness`: its ticket's bound.
        """
        last = oldest_step + max_staleness
        if self._sync_interval > 1:
            end_of_interval = oldest_step - oldest_step % self._sync_interval + self._sync_interval - 1
            last = min(last, end_of_interval)
        return last
