"""Asks the engines for log-probs after pushes and compares them with the trainer's (trainer rank 0).

    publisher: version active at a server ----\\
    training thread: first forward of a step ---+-> both of the same step -> ScoreTokens -> TokenScores
                                                    -> passed, or jump: `on_jump`

A version that was replaced before it could be checked is not checked.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from areal_like.wire.messages.weights import ScoreTokens, TokenScores, WeightsFailed
from trainer.weights.receivers import ReceiverId
from trainer.weights.weight_check import NOISE, CheckTokens, JumpDetector, RepushRule

log = logging.getLogger(__name__)

ScoreAt = Callable[[ReceiverId, ScoreTokens], Awaitable[TokenScores | WeightsFailed]]


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Outcome of one check."""

    server: str
    version: int
    difference: float
    """Mean |difference| of log-probs, in nats."""
    limit: float
    """Largest difference that would have passed."""
    is_jump: bool


class WeightChecks:
    """Runs at most one check at a time of each server. Create it in the publisher's event loop."""

    def __init__(
        self,
        score_at: ScoreAt,
        *,
        interval_s: float,
        on_report: Callable[[CheckReport], None],
        on_repush: Callable[[ReceiverId], None],
        noise: float = NOISE["float32"],
    ) -> None:
        """`score_at`: sends a request to a server. `interval_s`: shortest time between two checks of one.

        `on_repush`: called with a server that needs the weights again. `noise`: as of JumpDetector.
        """
        self._score_at = score_at
        self._interval_s = interval_s
        self._on_report = on_report
        self._on_repush = on_repush
        self._tokens: CheckTokens | None = None
        self._active: dict[ReceiverId, tuple[int, int]] = {}
        """Server -> (step, version) that it has activated and that is not checked yet."""
        self._due_s: dict[ReceiverId, float] = {}
        self._jumps = JumpDetector(noise=noise)
        self._repush = RepushRule()
        self._tasks: dict[ReceiverId, asyncio.Task[None]] = {}
        self.next_due_s = 0.0
        """Monotonic time before which no check can start; read by the training thread."""

    def scored_by_trainer(self, tokens: CheckTokens) -> None:
        """Takes the trainer's log-probs of the current step."""
        self._tokens = tokens
        self._start_due()

    def activated(self, receiver: ReceiverId, *, step: int, version: int) -> None:
        """Records that a server reports these weights as active."""
        self._active[receiver] = (step, version)
        self._start_due()

    def keep_only(self, receivers: set[ReceiverId]) -> None:
        """Forgets every other server."""
        self._active = {key: active for key, active in self._active.items() if key in receivers}
        self._due_s = {key: due_s for key, due_s in self._due_s.items() if key in receivers}

    async def close(self) -> None:
        """Cancels the checks that are running."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start_due(self) -> None:
        now_s, tokens = time.monotonic(), self._tokens
        for receiver, (step, version) in list(self._active.items()):
            is_due = self._due_s.get(receiver, 0.0) <= now_s and receiver not in self._tasks
            if tokens is not None and step == tokens.step and is_due:
                del self._active[receiver]
                self._set_due(receiver, now_s + self._interval_s)
                task = asyncio.create_task(
                    self._check(receiver, tokens, version), name=f"weight-check-{receiver[0]}"
                )
                self._tasks[receiver] = task
                task.add_done_callback(functools.partial(self._ended, receiver))

    def _ended(self, receiver: ReceiverId, task: asyncio.Task[None]) -> None:
        del self._tasks[receiver]

    def _set_due(self, receiver: ReceiverId, due_s: float) -> None:
        self._due_s[receiver] = due_s
        self.next_due_s = min(self._due_s.values())

    async def _check(self, receiver: ReceiverId, tokens: CheckTokens, version: int) -> None:
        name, limit = receiver[0], self._jumps.limit
        reply = await self._score_at(receiver, ScoreTokens(tokens=tokens.tokens, first=tokens.first))
        if not isinstance(reply, TokenScores) or reply.version != version:
            reason = (
                reply.reason if isinstance(reply, WeightsFailed) else f"it has version {reply.version} now"
            )
            log.debug("version %d at %s was not checked: %s", version, name, reason)
            self._set_due(receiver, 0.0)
            return
        is_short = len(reply.logprobs) != len(tokens.logprobs)
        difference = float("nan") if is_short else tokens.difference(reply.logprobs)
        is_jump = self._jumps.is_jump(difference)
        self._on_report(
            CheckReport(server=name, version=version, difference=difference, limit=limit, is_jump=is_jump)
        )
        if not is_jump:
            if self._repush.passed(receiver):
                log.info("%s has the weights of version %d again", name, version)
            return
        pushes_again = self._repush.jumped(receiver)
        log.error(
            "%s reports version %d and does not have its weights: its log-probs of %d tokens differ from the "
            "trainer's by %.3g on average, and at most %.3g is numerical noise%s",
            name,
            version,
            len(tokens.logprobs),
            difference,
            limit,
            "; the weights are pushed again" if pushes_again else "",
        )
        self._set_due(receiver, 0.0)  # the next version is checked at once
        if pushes_again:
            self._on_repush(receiver)
