"""What a ledger does when a run's prompts come from other data than before.

Servers tell the fingerprint of their task's content when they register; the directory of peers admits only
those that agree with the first one. The ledger remembers the fingerprint. If it has changed since an earlier
buffer, prompt indices mean other prompts: what is issued and not recorded yet is cancelled, and the order of
prompts and the curriculum begin anew. Recorded groups keep their prompts' tokens, so they are trained.

A changed configuration of the task is detected when the buffer starts, and handled in `stream_start.py`.
"""

from __future__ import annotations

import logging

from areal_like.wire.messages.producer import Purpose
from buffer.ledger.lifecycle import TicketLifecycle
from buffer.ledger.state import LedgerState
from buffer.tickets import Drop, State

log = logging.getLogger(__name__)

CONTENT = "shape:content"
"""Scalar with the content under which prompts were issued; 0 or absent: not known (an earlier release)."""


class DataChange:
    """Compares the servers' content with the ledger's."""

    def __init__(self, state: LedgerState, lifecycle: TicketLifecycle) -> None:
        self._state = state
        self._lifecycle = lifecycle

    def set_content(self, content: int) -> None:
        """Sets the content of the servers' task, a positive number; 0: not known."""
        state = self._state
        if not content or content == state.content:
            return
        before, state.content = state.content, content
        state.store.put_scalar(CONTENT, content)
        if before:
            log.warning("the data of the task has changed: its prompts are issued from the beginning")
            self._begin_anew()

    def _begin_anew(self) -> None:
        state = self._state
        # For a trainer that starts later: the position in its checkpoint is one in the old data.
        state.prompts_changed = state.prompts_changed or bool(state.closed_reason)
        for ticket in state.tickets.of_purpose(Purpose.TRAIN):
            if ticket.state is not State.BATCHED:
                self._lifecycle.drop(ticket, Drop.CANCELLED)
        state.prompts.restart(cursor=0, pending=[])
        state.prompts.forget_outcomes()
