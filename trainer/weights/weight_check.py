"""Decides from log-probs whether an engine has the weights that it reports. Pure.

An engine may answer a push with success and keep its old weights, or load some tensors wrongly, and then
report a version that its tokens do not come from. So the engines are asked, after pushes, for the log-probs
of a few tokens that the trainer has scored with the same weights. The mean absolute difference of a correct
engine is its numerical noise: 1e-6 in float32, some hundredths in bfloat16. A difference far above that of
earlier checks is a jump.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.batching.packing import PackedBatch
from trainer.weights.receivers import ReceiverId

MAX_SCORED = 32
"""Tokens scored in one check. The embedded engine decodes nothing else meanwhile."""
MAX_CONTEXT = 8192
"""A check with more tokens is not made: its message and its prefill would be large."""
_WINDOW = 64
_MIN_HISTORY = 3
_FACTOR = 3.0
NOISE = {"float32": 1e-3, "bfloat16": 0.05}
"""By `model.dtype`: a mean difference that is never a jump, in nats. In bfloat16 a check of few tokens with
nearly certain answers may differ by a few thousandths, and the next one by some hundredths."""
_UNKNOWN_LIMIT = 0.5
"""Limit before there is a history: above the noise of any correct engine, bfloat16 and 8 bits included."""


@dataclass(frozen=True, kw_only=True)
class CheckTokens:
    """Tokens and their log-probs under the weights at the start of a step."""

    step: int
    """Completed optimizer steps."""
    tokens: list[int]
    first: int
    """Index of the first token with a log-prob."""
    logprobs: list[float]
    """Of the tokens from `first` on."""

    def difference(self, logprobs: Sequence[float]) -> float:
        """Mean |difference| in nats to an engine's log-probs of these tokens; NaN if one is not finite."""
        pairs = zip(self.logprobs, logprobs, strict=True)
        return math.fsum(abs(ours - theirs) for ours, theirs in pairs) / len(self.logprobs)


def check_tokens(batch: PackedBatch, logp_S: Tensor, *, step: int) -> CheckTokens | None:
    """The first sampled tokens of a micro-batch's first sequence that is short enough; None if there is none.

    `logp_S`: log-probs of the batch's sampled tokens. The part of a sequence before a token decides its
    log-prob, so the rest of the sequence is left out.
    """
    sampled = batch.sampled_S.tolist()
    start, at = 0, 0
    for length in batch.lengths:
        end, begin = start + length, at
        while at < len(sampled) and sampled[at] < end:
            at += 1
        run = begin
        while run < at and run < begin + MAX_SCORED and sampled[run] - sampled[begin] == run - begin:
            run += 1
        if run > begin and sampled[run - 1] - start < MAX_CONTEXT:
            return CheckTokens(
                step=step,
                tokens=batch.tokens_T[start : sampled[run - 1] + 1].tolist(),
                first=sampled[begin] - start,
                logprobs=logp_S[begin:run].detach().tolist(),
            )
        start = end
    return None


class JumpDetector:
    """Finds differences that are far above those of the last checks of all engines.

    The limit is three times the median of the last 64 accepted differences, and never below `noise`.
    """

    def __init__(self, *, noise: float = NOISE["float32"]) -> None:
        """`noise`: of the job's dtype, see `NOISE`."""
        self._noise = noise
        self._accepted: deque[float] = deque(maxlen=_WINDOW)

    @property
    def limit(self) -> float:
        """Largest difference, in nats, that is accepted now."""
        if len(self._accepted) < _MIN_HISTORY:
            return _UNKNOWN_LIMIT
        return max(self._noise, _FACTOR * statistics.median(self._accepted))

    def is_jump(self, difference: float) -> bool:
        """Takes one check's difference into account; True if it is a jump or not finite."""
        if not difference <= self.limit:
            return True
        self._accepted.append(difference)
        return False


class RepushRule:
    """Which jumps are answered by another push of the same weights: of jumps in a row 1, 2, 4, 8, ...

    If pushes do not help, more of them only cost time; the alert stays.
    """

    def __init__(self) -> None:
        self._jumps_in_a_row: dict[ReceiverId, int] = {}

    def passed(self, receiver: ReceiverId) -> bool:
        """Records a check without a jump; returns True if the one before was a jump."""
        return self._jumps_in_a_row.pop(receiver, 0) > 0

    def jumped(self, receiver: ReceiverId) -> bool:
        """Records a jump; returns True if the weights should be pushed again."""
        count = self._jumps_in_a_row[receiver] = self._jumps_in_a_row.get(receiver, 0) + 1
        return count.bit_count() == 1
