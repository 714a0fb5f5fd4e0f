"""Compares the sampled and the trained samples of a run: lengths, difficulty, failures, wasted tokens.

A filter, a staleness bound or a failure policy changes the distribution that is trained on: a verifier that
hangs on long completions, for instance, removes long completions. `selection_report` makes that visible. It
works on flat counters (`RunCounters.counters`) that can be added over shards; histograms have fixed buckets
for the same reason, and percentiles are interpolated in them.

    offered   train samples that arrived with a reward (greedy baselines excluded)
    trained   samples of completed steps
    failed    samples that failed, by kind

With `buffer.overdue=close` a sample that is trained on may have tokens beyond the staleness bound. By default
these are masked: they are not among the tokens that are trained on, but the sample counts with its whole
length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from areal_like.failures import FailureKind, FailurePolicy

MAX_BUCKET = 18
"""The last bucket of lengths, which has no upper limit."""
LENGTHS = tuple(1 << bucket for bucket in range(MAX_BUCKET))
"""Upper limits of the other buckets, in sampled tokens: 1, 2, 4, ... 131072."""
SOLVE_RATES = ("0", "0_25", "25_50", "50_75", "75_100", "100")
"""Buckets of a group's solve rate, in percent: exactly 0, up to 25, ..., below 100, exactly 100."""
SAMPLE_POPULATIONS = ("offered", "trained")
GROUP_POPULATIONS = ("groups_offered", "groups_trained")
_WASTED = "tokens_wasted_"
_PERCENTILES = (50, 90, 99)


def length_bucket(num_tokens: int) -> int:
    """The bucket of a length of at least 1 token: bucket b holds lengths above 2^(b-1) up to 2^b."""
    return min(MAX_BUCKET, (num_tokens - 1).bit_length())


def solve_rate_bucket(rewards: Sequence[float], *, low: float, high: float) -> str:
    """The bucket of a group's solve rate: its clipped rewards as a share of the way from `low` to `high`."""
    rate = sum(min(1.0, max(0.0, (reward - low) / (high - low))) for reward in rewards) / len(rewards)
    if rate in (0.0, 1.0):
        return SOLVE_RATES[-1 if rate else 0]
    return SOLVE_RATES[min(4, 1 + int(rate * 4))]


def length_key(population: str, bucket: int) -> str:
    return f"{population}_length_{bucket}"


def masked_key(bucket: int) -> str:
    """Name of the counter of tokens beyond the bound, of trained samples of one bucket of lengths."""
    return f"masked_length_{bucket}"


def solve_rate_key(population: str, bucket: str) -> str:
    return f"{population}_solved_{bucket}"


def failure_key(kind: FailureKind, outcome: FailurePolicy) -> str:
    """Name of the counter of failures of one kind that ended in one way."""
    return f"failed_{kind.value}_{outcome.value}"


def wasted_key(reason: str) -> str:
    """Name of the counter of tokens that were sampled and not trained on, for one reason."""
    return f"{_WASTED}{reason}"


def lengths_of(counters: Mapping[str, float], populations: Iterable[str]) -> list[int]:
    """[MAX_BUCKET + 1] number of samples by length, added over populations."""
    each = [[counters.get(length_key(name, b), 0) for b in range(MAX_BUCKET + 1)] for name in populations]
    # Rolling back a step that an older release counted can leave a negative count.
    return [max(0, int(sum(column))) for column in zip(*each, strict=True)]


def failures_of(counters: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Failed samples by kind and by outcome, zeros left out."""
    table = {
        kind.value: {
            outcome.value: int(count)
            for outcome in FailurePolicy
            if (count := counters.get(failure_key(kind, outcome), 0))
        }
        for kind in FailureKind
    }
    return {kind: outcomes for kind, outcomes in table.items() if outcomes}


def wasted_of(counters: Mapping[str, float]) -> dict[str, int]:
    """Tokens that were sampled and not trained on, by reason, zeros left out."""
    wasted = {name: int(value) for name, value in counters.items() if name.startswith(_WASTED) and value > 0}
    return {name.removeprefix(_WASTED): wasted[name] for name in sorted(wasted)}


def masked_of(counters: Mapping[str, float]) -> list[int]:
    """[MAX_BUCKET + 1] number of tokens beyond the bound of trained samples, by length of the samples."""
    return [max(0, int(counters.get(masked_key(bucket), 0))) for bucket in range(MAX_BUCKET + 1)]


def closing_report(counters: Mapping[str, float]) -> dict[str, Any]:
    """Closed groups and their samples (`buffer.overdue=close`); empty if no group was closed."""
    names = ("groups_closed", "samples_early", "samples_late", "parts_dropped", "tokens_masked")
    if not counters.get("groups_closed"):
        return {}
    # The ledger's own counter of dropped parts has the name with `num_`.
    values = {name: int(counters.get(name, counters.get(f"num_{name}", 0))) for name in names}
    trained = counters.get("tokens_trained", 0) + values["tokens_masked"]
    share = round(values["tokens_masked"] / trained, 6) if trained else None
    return values | {
        "tokens_masked_share": share,
        "tokens_masked_by_length": masked_of(counters),
    }


def selection_report(counters: Mapping[str, float], *, limit: float = math.inf) -> dict[str, Any]:
    """The section `selection` of summary.json.

    `limit`: the limit of sampled tokens in one turn; percentiles of single-turn samples do not exceed it.
    """
    report: dict[str, Any] = {
        name: _samples(counters, name, limit=limit)
        | {"reward_mean": _mean(counters, f"{name}_sum_reward", lengths_of(counters, [name]))}
        for name in SAMPLE_POPULATIONS
    }
    for name in GROUP_POPULATIONS:
        groups = {bucket: int(counters.get(solve_rate_key(name, bucket), 0)) for bucket in SOLVE_RATES}
        report[f"{name}_by_solve_rate"] = {bucket: max(0, count) for bucket, count in groups.items()}
    report["failures"] = {
        kind: outcomes | {"length": _samples(counters, f"failed_{kind}", limit=limit)}
        for kind, outcomes in failures_of(counters).items()
    }
    report["tokens_wasted"] = wasted_of(counters)
    report["prompts_given_up"] = int(counters.get("prompts_given_up", 0))
    if closing := closing_report(counters):
        report["closing"] = closing
    return report


def percentile(histogram: Sequence[int], percent: float, *, limit: float = math.inf) -> float | None:
    """A percentile of lengths, interpolated in its bucket; None without samples.

    A percentile in the last bucket is that bucket's lower limit. `limit`: the upper end of the bucket that
    contains it, if no sample is longer.
    """
    wanted = sum(histogram) * percent / 100
    if not wanted:
        return None
    below = bucket = 0
    while below + histogram[bucket] < wanted:
        below += histogram[bucket]
        bucket += 1
    if bucket >= MAX_BUCKET:
        return float(LENGTHS[-1])
    lower = LENGTHS[bucket] / 2 if bucket else 0.0
    is_longest = not sum(histogram[bucket + 1 :])
    upper = min(LENGTHS[bucket], limit) if is_longest and limit > lower else LENGTHS[bucket]
    return round(lower + (upper - lower) * (wanted - below) / histogram[bucket], 1)


def _samples(counters: Mapping[str, float], population: str, *, limit: float) -> dict[str, Any]:
    histogram = lengths_of(counters, [population])
    return {
        "samples": sum(histogram),
        "tokens_mean": _mean(counters, f"{population}_sum_tokens", histogram),
        **{f"tokens_p{percent}": percentile(histogram, percent, limit=limit) for percent in _PERCENTILES},
    }


def _mean(counters: Mapping[str, float], total: str, histogram: Sequence[int]) -> float | None:
    count = sum(histogram)
    return round(counters.get(total, 0.0) / count, 6) if count else None
