"""What the books say about the stream: counts of samples and tokens, and how stale was what was learned from.

Lag is counted when the trainer completes a step, not when a checkpoint commits it: that is when the data had its effect. A step
that a resumed trainer does again is counted once.
"""

from __future__ import annotations

from collections import Counter

from buffer.tickets import REFUSALS, Sample, Ticket, Verdict


class StreamStatistics:
    """Running sums; constant memory (the histogram has at most max_staleness + 1 keys)."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.num_failures = 0
        self.num_leases_lost = 0
        self.num_reissued = 0
        self.tokens_accepted = 0
        """Sampled tokens of accepted samples, eval included."""
        self.tokens_refused = 0
        """Sampled tokens of refused samples: generated for nothing."""
        self.lag_histogram: Counter[int] = Counter()
        """Lag (steps) -> trained samples."""
        self.tokens_trained = 0
        self._sum_token_lag = 0
        self.num_samples_dropped = 0
        self.tokens_dropped = 0

    def offered(self, verdict: Verdict, *, num_sampled: int) -> None:
        """A sample came in. A duplicate's tokens were counted the first time."""
        self.verdicts[verdict] += 1
        if verdict is Verdict.ACCEPTED:
            self.tokens_accepted += num_sampled
        elif verdict.refusal:
            self.tokens_refused += num_sampled

    def dropped(self, ticket: Ticket) -> None:
        """A ticket was dropped with these samples in it."""
        self.num_samples_dropped += len(ticket.samples)
        self.tokens_dropped += sum(sample.num_sampled for sample in ticket.samples.values())

    def trained(self, sample: Sample, *, step: int) -> None:
        """The trainer learned from a sample in `step`."""
        self.lag_histogram[step - sample.oldest_step] += 1
        self.tokens_trained += sample.num_sampled
        self._sum_token_lag += step * sample.num_sampled - sample.sum_token_steps

    @property
    def num_samples_trained(self) -> int:
        """Samples learned from."""
        return self.lag_histogram.total()

    def counters(self) -> dict[str, float]:
        """Flat numbers for `Books.counters` and /status."""
        trained, lags = self.num_samples_trained, self.lag_histogram
        return {
            "samples_accepted": self.verdicts[Verdict.ACCEPTED],
            "samples_duplicate": self.verdicts[Verdict.DUPLICATE],
            "samples_failed": self.num_failures,
            "samples_trained": trained,
            "samples_dropped": self.num_samples_dropped,
            **{f"refusals_{verdict.value.replace(' ', '_')}": self.verdicts[verdict] for verdict in REFUSALS},
            "leases_lost": self.num_leases_lost,
            "tickets_reissued": self.num_reissued,
            "tokens_generated": self.tokens_accepted + self.tokens_refused,
            "tokens_trained": self.tokens_trained,
            "tokens_dropped": self.tokens_dropped,
            "max_trained_lag": max(lags, default=0),
            "mean_trained_lag": sum(lag * count for lag, count in lags.items()) / trained if trained else 0.0,
            "mean_trained_token_lag": self._sum_token_lag / self.tokens_trained if self.tokens_trained else 0.0,
            "mean_trained_sample_tokens": self.tokens_trained / trained if trained else 0.0,
            "mean_dropped_sample_tokens": self.tokens_dropped / self.num_samples_dropped if self.num_samples_dropped else 0.0,
        }
