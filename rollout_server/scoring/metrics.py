"""The Prometheus series of a score server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from areal_like.runtime.metrics import SECONDS, Metrics


class Refused(StrEnum):
    """Why a text has no score: the label of the metric `areal_scorer_refused_total`."""

    INVALID = "invalid"
    """The request is malformed, or its messages cannot be rendered."""
    TOO_LONG = "too_long"
    """The text has more tokens than `scorer.max_length`, or than the model's context."""
    NOT_FINITE = "not_finite"
    """The model's score is not a finite number."""
    FULL = "full"
    """`scorer.max_waiting` texts wait already."""
    LATE = "late"
    """It waited longer than its client does."""
    FAILED = "failed"
    """The forward pass failed."""


class ScorerSeries:
    """Counts what one score server does."""

    def __init__(self, metrics: Metrics, *, num_waiting: Callable[[], int], identity: str) -> None:
        """`num_waiting`: texts that have no score yet. `identity`: of the reward model."""
        self._num_scores = metrics.counter("scorer_scores", "Texts scored.")
        self._num_tokens = metrics.counter("scorer_tokens", "Tokens of the texts scored.")
        self._num_padding = metrics.counter("scorer_padding_tokens", "Padding in the batches.")
        self._num_batches = metrics.counter("scorer_batches", "Forward passes of the reward model.")
        self._busy_s = metrics.counter("scorer_busy_seconds", "Time spent in forward passes.")
        self._num_refused = metrics.counter(
            "scorer_refused", "Texts without a score, by reason.", label="reason", values=list(Refused)
        )
        waiting = metrics.gauge("scorer_waiting", "Texts that wait for their score.")
        waiting.set_function(lambda: float(num_waiting()))
        self._latency = metrics.histogram(
            "scorer_request_seconds", "Time from the arrival of a text to its score.", buckets=SECONDS
        )
        model = metrics.gauge("scorer_model", "The reward model's identity; always 1.", label="model")
        model.labels(identity).set(1)

    def scored(self, *, num_tokens: int, seconds: float) -> None:
        """A text has its score, `seconds` after its arrival."""
        self._num_scores.inc()
        self._num_tokens.inc(num_tokens)
        self._latency.observe(seconds)

    def refused(self, reason: Refused) -> None:
        """A text has none."""
        self._num_refused.labels(reason.value).inc()

    def passed(self, lengths: Sequence[int], *, seconds: float) -> None:
        """A forward pass has ended. `lengths`: of its texts, in tokens."""
        self._num_batches.inc()
        self._busy_s.inc(seconds)
        self._num_padding.inc(max(lengths) * len(lengths) - sum(lengths))
