"""Counters of the stream: samples and tokens by outcome, and the lag of trained samples.

Lag is counted when the trainer completes a step, because then the samples have taken effect, and not when a
checkpoint commits the step. A step that a resumed trainer repeats is counted once. Counters survive a
restart: they are stored as pairs of name and number whenever they change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from buffer.tickets import REFUSALS, SampleSummary, Ticket, Verdict

_LAG = "trained_lag_"
_VERDICT = "verdict_"


class StreamCounters:
    """Running sums in constant memory (there are at most max_staleness + 1 different lags)."""

    def __init__(self) -> None:
        self._values = Counter[str]()
        self._changed: set[str] = set()

    def restore(self, values: Mapping[str, float]) -> None:
        """Continues from the values of an earlier buffer."""
        self._values = Counter({name: int(value) for name, value in values.items()})

    def take_changes(self) -> dict[str, float]:
        """Current values of the counters that changed since the last call."""
        changes: dict[str, float] = {name: self._values[name] for name in self._changed}
        self._changed.clear()
        return changes

    def count_offered(self, verdict: Verdict, *, num_sampled: int) -> None:
        """Counts a sample that arrived. The tokens of a duplicate were counted the first time."""
        self._add(_VERDICT + verdict.name.lower(), 1)
        if verdict is Verdict.ACCEPTED:
            self._add("tokens_accepted", num_sampled)
        elif verdict.refusal:
            self._add("tokens_refused", num_sampled)

    def count_failure(self) -> None:
        """Counts a failed sample."""
        self._add("num_failures", 1)

    def count_lost_lease(self) -> None:
        """Counts a lease that expired, was returned or was revoked with samples missing."""
        self._add("num_leases_lost", 1)

    def count_reissue(self) -> None:
        """Counts a dropped ticket whose prompt is issued again."""
        self._add("num_reissued", 1)

    def count_dropped(self, ticket: Ticket) -> None:
        """Counts the samples of a dropped ticket."""
        self._add("num_samples_dropped", len(ticket.samples))
        self._add("tokens_dropped", sum(sample.num_sampled for sample in ticket.samples.values()))

    def count_trained(self, sample: SampleSummary, *, step: int) -> None:
        """Counts a sample that was trained on in `step`."""
        self._add_trained(sample, step=step, sign=1)

    def uncount_trained(self, sample: SampleSummary, *, step: int) -> None:
        """Undoes `count_trained`: the step will be repeated with other samples."""
        self._add_trained(sample, step=step, sign=-1)

    def _add_trained(self, sample: SampleSummary, *, step: int, sign: int) -> None:
        self._add(f"{_LAG}{step - sample.oldest_step}", sign)
        self._add("tokens_trained", sign * sample.num_sampled)
        self._add("sum_token_lag", sign * (step * sample.num_sampled - sample.sum_token_steps))

    def _add(self, name: str, amount: int) -> None:
        self._values[name] += amount
        self._changed.add(name)

    def __getitem__(self, name: str) -> int:
        return int(self._values[name])

    @property
    def verdicts(self) -> Counter[Verdict]:
        """Samples that arrived, by verdict."""
        return Counter({verdict: self[_VERDICT + verdict.name.lower()] for verdict in Verdict})

    @property
    def lag_histogram(self) -> Counter[int]:
        """Lag in optimizer steps -> trained samples."""
        lags = {name: count for name, count in self._values.items() if name.startswith(_LAG)}
        return Counter({int(name.removeprefix(_LAG)): int(count) for name, count in lags.items() if count})

    def summary(self) -> dict[str, float]:
        """Sums and means by name, for `RunCounters.counters` and /status."""
        lags, verdicts = self.lag_histogram, self.verdicts
        trained, tokens_trained = lags.total(), self["tokens_trained"]
        dropped, tokens_dropped = self["num_samples_dropped"], self["tokens_dropped"]
        return {
            "samples_accepted": verdicts[Verdict.ACCEPTED],
            "samples_duplicate": verdicts[Verdict.DUPLICATE],
            "samples_failed": self["num_failures"],
            "samples_trained": trained,
            "samples_dropped": dropped,
            **{f"refusals_{verdict.value.replace(' ', '_')}": verdicts[verdict] for verdict in REFUSALS},
            "leases_lost": self["num_leases_lost"],
            "tickets_reissued": self["num_reissued"],
            "tokens_generated": self["tokens_accepted"] + self["tokens_refused"],
            "tokens_trained": tokens_trained,
            "tokens_dropped": tokens_dropped,
            "max_trained_lag": max(lags, default=0),
            "mean_trained_lag": sum(lag * count for lag, count in lags.items()) / trained if trained else 0.0,
            "mean_trained_token_lag": self["sum_token_lag"] / tokens_trained if tokens_trained else 0.0,
            "mean_trained_sample_tokens": tokens_trained / trained if trained else 0.0,
            "mean_dropped_sample_tokens": tokens_dropped / dropped if dropped else 0.0,
        }
