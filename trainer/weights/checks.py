"""Requests log-probs from engines after pushes, to check that they have the weights that they report.

An engine may report success for a push but keep its old weights or load some tensors wrongly; its tokens then
do not come from the version that it reports. So after pushes the engines compute the log-probs of a few
tokens that the trainer has scored with the same weights. The mean absolute difference of a correct engine is
its numerical noise: 1e-6 in float32, some hundredths in bfloat16. A difference far above that of earlier
checks is a jump.

    publisher: version active at a server ----\\
    training thread: first forward of a step ---+-> both of the same step -> ScoreTokens -> TokenScores
                                                    -> passed, or jump: `on_jump`

A version that was replaced before it could be checked is not checked. The decisions are pure; only
`WeightChecks` has tasks and a clock.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from areal_like.wire.messages.weights import ScoreTokens, TokenScores, WeightsFailed
from trainer.batching.packing import PackedBatch
from trainer.weights.receivers import ReceiverId

log = logging.getLogger(__name__)

MAX_SCORED = 32
"""Tokens scored in one check, during which the embedded engine does not decode."""
MAX_CONTEXT = 8192
"""Most tokens of a check, because its message and its prefill would be large."""
_WINDOW = 64
_MIN_HISTORY = 3
_FACTOR = 3.0
NOISE = {"float32": 1e-3, "bfloat16": 0.05}
"""`model.dtype` -> mean difference of MAX_SCORED tokens, in nats, that is never a jump. In bfloat16 one check
of nearly certain tokens may differ by a few thousandths, and the next one by some hundredths."""
MERGED_HINT = (
    "; the push had the base merged with the adapter and rounded to {dtype}, which the trainer's own forward "
    "does not do (lora_lost_updates is the share of updates that rounding undoes)"
)
"""End of the message about a jump with `model.lora` and `weights.lora=merged`. The limit needs no value of
its own for merged weights: it follows the differences of earlier checks, which include this rounding."""
_UNKNOWN_LIMIT = 0.5
"""Limit before there is a history: above the noise of any correct engine, including bfloat16 and 8 bits."""


@dataclass(frozen=True, kw_only=True)
class CheckTokens:
    """Tokens and their log-probs under the weights at the start of a step."""

    step: int
    """Completed optimizer steps."""
    tokens: list[int]
    first: int
    """Index of the first token with a log-prob."""
    logprobs: list[float]
    """Log-probs of the tokens from `first` on."""

    def difference(self, logprobs: Sequence[float]) -> float:
        """Mean |difference| in nats to an engine's log-probs of these tokens; NaN if one is not finite."""
        pairs = zip(self.logprobs, logprobs, strict=True)
        return math.fsum(abs(ours - theirs) for ours, theirs in pairs) / len(self.logprobs)


def check_tokens(batch: PackedBatch, logp_S: Tensor, *, step: int) -> CheckTokens | None:
    """The first sampled tokens of a sequence of a micro-batch: of the one that has most, MAX_SCORED at most.

    None if every sequence is too long. `logp_S`: log-probs of the batch's sampled tokens. A token's log-prob
    depends only on the part of the sequence before it, so the rest is left out.
    """
    sampled = batch.sampled_S.tolist()
    found: tuple[int, int, int] | None = None
    start, at = 0, 0
    for length in batch.lengths:
        end, begin = start + length, at
        while at < len(sampled) and sampled[at] < end:
            at += 1
        run = begin
        while run < at and run < begin + MAX_SCORED and sampled[run] - sampled[begin] == run - begin:
            run += 1
        is_longer = run - begin > (found[2] - found[1] if found else 0)
        if is_longer and sampled[run - 1] - start < MAX_CONTEXT:
            found = start, begin, run
            if run - begin == MAX_SCORED:
                break
        start = end
    if found is None:
        return None
    start, begin, run = found
    return CheckTokens(
        step=step,
        tokens=batch.tokens_T[start : sampled[run - 1] + 1].tolist(),
        first=sampled[begin] - start,
        logprobs=logp_S[begin:run].detach().tolist(),
    )


class JumpDetector:
    """Finds differences that are far above those of the last checks of all engines.

    The limit for MAX_SCORED tokens is three times the median of the last 64 accepted differences, and never
    below `noise`. The mean of fewer tokens varies more, by the root of their number, and so does its limit:
    of three tokens in bfloat16 a single one can raise the mean above `noise`.
    """

    def __init__(self, *, noise: float = NOISE["float32"]) -> None:
        """`noise`: the value of `NOISE` for the job's dtype."""
        self._noise = noise
        self._accepted: deque[float] = deque(maxlen=_WINDOW)

    def limit(self, num_tokens: int) -> float:
        """Largest mean difference of so many tokens, in nats, that is accepted now."""
        if len(self._accepted) < _MIN_HISTORY:
            return _UNKNOWN_LIMIT
        of_many = max(self._noise, _FACTOR * statistics.median(self._accepted))
        return of_many * math.sqrt(MAX_SCORED / num_tokens)

    def is_jump(self, difference: float, num_tokens: int = MAX_SCORED) -> bool:
        """Records one check's difference; returns True if it is a jump or not finite."""
        if not difference <= self.limit(num_tokens):
            return True
        self._accepted.append(difference)
        return False


class RepushRule:
    """Decides which jumps lead to another push of the same weights: the 1st, 2nd, 4th, 8th, ... in a row.

    If pushes do not help, more of them only cost time; the alert stays.
    """

    def __init__(self) -> None:
        self._jumps_in_a_row: dict[ReceiverId, int] = {}

    def passed(self, receiver: ReceiverId) -> bool:
        """Records a check without a jump; returns True if the previous one was a jump."""
        return self._jumps_in_a_row.pop(receiver, 0) > 0

    def jumped(self, receiver: ReceiverId) -> bool:
        """Records a jump; returns True if the weights should be pushed again."""
        count = self._jumps_in_a_row[receiver] = self._jumps_in_a_row.get(receiver, 0) + 1
        return count.bit_count() == 1


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
    """Runs at most one check at a time for each server. Create it in the publisher's event loop."""

    def __init__(
        self,
        score_at: ScoreAt,
        *,
        interval_s: float,
        on_report: Callable[[CheckReport], None],
        on_repush: Callable[[ReceiverId], None],
        noise: float = NOISE["float32"],
        hint: str = "",
    ) -> None:
        """`score_at`: sends a request to a server. `interval_s`: shortest time between two checks of a
        server.

        `on_repush`: called with a server that needs the weights again. `noise`: see JumpDetector. `hint`: end
        of the message about a jump: how the pushed weights differ from those that the trainer computes with.
        """
        self._hint = hint
        self._score_at = score_at
        self._interval_s = interval_s
        self._on_report = on_report
        self._on_repush = on_repush
        self._tokens: CheckTokens | None = None
        self._active: dict[ReceiverId, tuple[int, int]] = {}
        """Server -> (step, version) that it has activated and that is still unchecked."""
        self._due_s: dict[ReceiverId, float] = {}
        self._jumps = JumpDetector(noise=noise)
        self._repush = RepushRule()
        self._tasks: dict[ReceiverId, asyncio.Task[None]] = {}
        self.next_due_s = 0.0
        """Monotonic time before which no check can start; read by the training thread."""

    def scored_by_trainer(self, tokens: CheckTokens) -> None:
        """Records the trainer's log-probs of the current step."""
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
        name, num_tokens = receiver[0], len(tokens.logprobs)
        limit = self._jumps.limit(num_tokens)
        reply = await self._score_at(receiver, ScoreTokens(tokens=tokens.tokens, first=tokens.first))
        if not isinstance(reply, TokenScores) or reply.version != version:
            reason = (
                reply.reason if isinstance(reply, WeightsFailed) else f"it has version {reply.version} now"
            )
            log.debug("version %d at %s was not checked: %s", version, name, reason)
            self._set_due(receiver, 0.0)
            return
        is_short = len(reply.logprobs) != num_tokens
        difference = float("nan") if is_short else tokens.difference(reply.logprobs)
        is_jump = self._jumps.is_jump(difference, num_tokens)
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
            "trainer's by %.3g on average, and at most %.3g is numerical noise%s%s",
            name,
            version,
            num_tokens,
            difference,
            limit,
            self._hint,
            "; the weights are pushed again" if pushes_again else "",
        )
        self._set_due(receiver, 0.0)  # the next version is checked at once
        if pushes_again:
            self._on_repush(receiver)
