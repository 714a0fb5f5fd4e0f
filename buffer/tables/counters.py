"""Counters of the stream: samples and tokens by outcome, their lengths, and the lag of trained samples.

Lag is counted when the trainer completes a step, because then the samples have taken effect, and not when a
checkpoint commits the step. A step that a resumed trainer repeats is counted once. Counters survive a
restart: they are stored as pairs of name and number whenever they change. The counters that
`areal_like.selection` compares (offered and trained samples) have the names that it defines.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Literal

from areal_like.failures import FailureKind, FailurePolicy
from areal_like.selection import (
    MAX_BUCKET,
    failure_key,
    length_bucket,
    length_key,
    masked_key,
    solve_rate_bucket,
    solve_rate_key,
    wasted_key,
)
from areal_like.trajectory import LARGEST_REWARD
from buffer.tickets import REFUSALS, Drop, SampleSummary, Ticket, Verdict

_LAG = "trained_lag_"
_VERDICT = "verdict_"
_POPULATIONS = ("offered", "trained", *(f"failed_{kind.value}" for kind in FailureKind))
# Built once, because every sample passes here.
_NAMES = {
    name: (
        [length_key(name, bucket) for bucket in range(MAX_BUCKET + 1)],
        f"{name}_sum_tokens",
        f"{name}_sum_reward",
    )
    for name in _POPULATIONS
}
"""Population -> counters of its lengths, its tokens and its rewards."""
_ZERO_NAMES = [failure_key(kind, FailurePolicy.ZERO) for kind in FailureKind]
_VERDICT_NAMES = {verdict: _VERDICT + verdict.name.lower() for verdict in Verdict}

Event = Literal[
    "num_leases_lost",
    "num_quarantines",
    "num_reissued",
    "prompts_given_up",
    "groups_closed",
    "samples_early",
    "samples_late",
    "held_back_s",
    "journals_full",
]
"""Leases that ended with samples missing; quarantines of servers; prompts that are issued again after a drop,
and those that are not (before the next epoch); closed groups, their samples that were complete, and those
that arrived later; seconds in which the trainer waited for samples that are complete, in groups that are
not; journals of sessions that were forgotten because they were too large."""


class StreamCounters:
    """Running sums in constant memory (the names are a fixed set, and at most max_staleness + 1 lags)."""

    def __init__(self, *, reward_low: float, reward_high: float) -> None:
        """`reward_low`, `reward_high`: rewards that count as a solve rate of 0 and of 1."""
        self._reward_low, self._reward_high = reward_low, reward_high
        self._values: defaultdict[str, float] = defaultdict(int)
        self._changes: dict[str, float] = {}
        """New values since the last `take_changes`."""

    def restore(self, values: Mapping[str, float]) -> None:
        """Continues from the values of an earlier buffer."""
        self._values = defaultdict(int, values)

    def take_changes(self) -> dict[str, float]:
        """Current values of the counters that changed since the last call."""
        changes, self._changes = self._changes, {}
        return changes

    @property
    def num_good_samples(self) -> int:
        """Accepted samples of the whole run that did not fail, without those recorded with reward 0 for a
        failure."""
        zeros = sum(self._values.get(name, 0) for name in _ZERO_NAMES)
        return int(self._values.get(_VERDICT_NAMES[Verdict.ACCEPTED], 0) - zeros)

    def count(self, event: Event, amount: float = 1) -> None:
        """Counts an event that has no tokens of its own."""
        self._add(event, amount)

    def count_offered(self, verdict: Verdict, *, num_sampled: int) -> None:
        """Counts a sample that arrived. The tokens of a duplicate were counted the first time."""
        self._add(_VERDICT_NAMES[verdict], 1)
        if verdict is Verdict.ACCEPTED:
            self._add("tokens_accepted", num_sampled)
        elif verdict.refusal:
            self._add("tokens_refused", num_sampled)
            self._add(wasted_key(verdict.name.lower()), num_sampled)

    def count_training_sample(self, sample: SampleSummary) -> None:
        self._add_sample("offered", sample, sign=1)

    def count_group(self, ticket: Ticket) -> None:
        """Counts a complete group by its solve rate."""
        self._add_group("groups_offered", ticket, sign=1)

    def count_failure(self, kind: FailureKind, outcome: FailurePolicy, *, num_tokens: int) -> None:
        """Counts a failed sample; its `num_tokens` sampled tokens are lost unless the outcome is ZERO."""
        self._add("num_failures", 1)
        self._add(failure_key(kind, outcome), 1)
        if num_tokens:
            lengths, sum_tokens, _ = _NAMES[f"failed_{kind.value}"]
            self._add(lengths[length_bucket(num_tokens)], 1)
            self._add(sum_tokens, num_tokens)
            if outcome is not FailurePolicy.ZERO:
                self._add(wasted_key(f"failed_{kind.value}"), num_tokens)

    def count_dropped(self, ticket: Ticket, reason: Drop) -> None:
        num_tokens = sum(sample.num_sampled for sample in ticket.samples.values())
        self._add("num_samples_dropped", len(ticket.samples))
        self._add("tokens_dropped", num_tokens)
        self._add(wasted_key(reason.value), num_tokens)

    def count_given_up_sample(self, sample: SampleSummary, reason: Drop) -> None:
        """Counts a complete sample of a closed group that is not trained on."""
        self._add("num_samples_dropped", 1)
        self._add("num_parts_dropped", 1)
        self._add("tokens_dropped", sample.num_sampled)
        self._add(wasted_key(reason.value), sample.num_sampled)

    def count_trained(self, ticket: Ticket, *, sign: int = 1) -> None:
        """Counts a group that was trained on in its step. `sign`: -1 undoes that, because the step will be
        repeated with other groups."""
        if not ticket.parts:
            self._add_group("groups_trained", ticket, sign=sign)
        first_step, num_trained, sum_lag = ticket.step - ticket.max_staleness, 0, 0
        for sample in ticket.training_samples:
            self._add_sample("trained", sample, sign=sign)
            trained = sample.trained_steps(first_step=first_step)
            num_tokens, sum_steps = sample.num_sampled, sample.sum_token_steps
            if len(trained) < len(sample.token_steps):
                num_tokens = sum(count for _, count in trained)
                sum_steps = sum(step * count for step, count in trained)
                num_masked = sample.num_sampled - num_tokens
                self._add("tokens_masked", sign * num_masked)
                self._add(masked_key(length_bucket(sample.num_sampled)), sign * num_masked)
            # A ticket of an earlier release may have no `token_steps`; it was within its bound as a whole.
            oldest_step = trained[0][0] if trained else sample.oldest_step
            self._add(f"{_LAG}{ticket.step - oldest_step}", sign)
            num_trained += num_tokens
            sum_lag += ticket.step * num_tokens - sum_steps
        self._add("tokens_trained", sign * num_trained)
        self._add("sum_token_lag", sign * sum_lag)

    def _add_group(self, population: str, ticket: Ticket, *, sign: int) -> None:
        rewards = [sample.reward for sample in ticket.training_samples]
        bucket = solve_rate_bucket(rewards, low=self._reward_low, high=self._reward_high)
        self._add(solve_rate_key(population, bucket), sign)

    def _add_sample(self, population: str, sample: SampleSummary, *, sign: int) -> None:
        num_tokens, reward = sample.num_sampled, sample.reward
        # Ledgers of earlier releases may hold larger numbers, and sums must stay finite for JSON and the
        # wire.
        if not -LARGEST_REWARD < reward < LARGEST_REWARD:
            reward = math.copysign(LARGEST_REWARD, reward)
        lengths, sum_tokens, sum_reward = _NAMES[population]
        self._add(lengths[length_bucket(num_tokens)], sign)
        self._add(sum_tokens, sign * num_tokens)
        self._add(sum_reward, sign * reward)

    def _add(self, name: str, amount: float) -> None:
        self._values[name] = self._changes[name] = self._values[name] + amount

    def __getitem__(self, name: str) -> int:
        return int(self._values.get(name, 0))

    @property
    def verdicts(self) -> Counter[Verdict]:
        """Samples that arrived, by verdict."""
        return Counter({verdict: self[_VERDICT_NAMES[verdict]] for verdict in Verdict})

    @property
    def lag_histogram(self) -> Counter[int]:
        """Lag in optimizer steps -> trained samples."""
        lags = {name: count for name, count in self._values.items() if name.startswith(_LAG)}
        return Counter({int(name.removeprefix(_LAG)): int(count) for name, count in lags.items() if count})

    @property
    def selection(self) -> dict[str, float]:
        """The counters that `areal_like.selection` reads, zeros left out."""
        prefixes = ("offered_", "trained_", "masked_", "groups_", "failed_", "tokens_wasted_")
        return {
            name: value
            for name, value in sorted(self._values.items())
            if value and name.startswith(prefixes) and not name.startswith(_LAG)
        }

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
            "quarantines": self["num_quarantines"],
            "tickets_reissued": self["num_reissued"],
            "prompts_given_up": self["prompts_given_up"],
            "tokens_generated": self["tokens_accepted"] + self["tokens_refused"],
            "tokens_trained": tokens_trained,
            "tokens_dropped": tokens_dropped,
            "groups_closed": self["groups_closed"],
            "samples_early": self["samples_early"],
            "samples_late": self["samples_late"],
            "parts_dropped": self["num_parts_dropped"],
            "tokens_masked": self["tokens_masked"],
            "journals_full": self["journals_full"],
            "held_back_s": round(self._values.get("held_back_s", 0.0), 3),
            "max_trained_lag": max(lags, default=0),
            "mean_trained_lag": sum(lag * count for lag, count in lags.items()) / trained if trained else 0.0,
            "mean_trained_token_lag": self["sum_token_lag"] / tokens_trained if tokens_trained else 0.0,
            "mean_trained_sample_tokens": tokens_trained / trained if trained else 0.0,
            "mean_dropped_sample_tokens": tokens_dropped / dropped if dropped else 0.0,
            **self.selection,
        }
