"""Recognizes a request that rank 0 sends again, because a renewed key has interrupted the connection.

It is not performed twice: its answer is sent again, or once when it is there. Pure.
"""

from __future__ import annotations

from areal_like.wire.channel import Envelope
from areal_like.wire.messages.weights import WeightsFailed, WeightsOk

_MAX_ANSWERS = 64
"""Requests that are remembered."""


class RepeatedRequests:
    """The newest requests and their answers.

    unknown -> is_new() -> waits or is being handled -> record_answer() -> answered
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[bytes, int], WeightsOk | WeightsFailed | None] = {}
        """By (route, request id); None: the request waits or is being handled."""

    def is_new(self, envelope: Envelope) -> bool:
        """Remembers a request; False if it came before. A request without an id is always new."""
        request = (envelope.peer, envelope.rid)
        if envelope.rid == 0:
            return True
        if request in self._answers:
            return False
        self._answers[request] = None
        if len(self._answers) > _MAX_ANSWERS:
            del self._answers[next(iter(self._answers))]
        return True

    def answer_to(self, envelope: Envelope) -> WeightsOk | WeightsFailed | None:
        """The answer that was recorded; None if there is none yet."""
        return self._answers.get((envelope.peer, envelope.rid))

    def record_answer(self, envelope: Envelope, answer: WeightsOk | WeightsFailed) -> None:
        """Keeps the answer of a request that is remembered."""
        if (envelope.peer, envelope.rid) in self._answers:
            self._answers[envelope.peer, envelope.rid] = answer
