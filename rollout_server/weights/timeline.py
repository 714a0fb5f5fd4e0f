"""What a server tells of a push that is active: a line in its log, a span in its trace."""

from __future__ import annotations

import logging
import time

from areal_like.spans import recorder
from areal_like.wire.messages.weights import WeightsOk

log = logging.getLogger(__name__)


def record_push(answer: WeightsOk) -> None:
    """`answer`: to the request that has just ended."""
    log.debug(
        "version %d active after %.3f s (stalled %.3f s)",
        answer.version,
        answer.seconds,
        answer.stall_seconds,
    )
    start_s = time.monotonic() - answer.seconds
    recorder.record("weights", f"v{answer.version}", start_s=start_s, stall_s=round(answer.stall_seconds, 4))
