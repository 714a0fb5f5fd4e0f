"""The metrics of one optimizer step, summed over its micro-batches and over ranks.

Every metric is kept as (sum, count) and reduced once at the end, so that it means the same for any number of
micro-batches and ranks. Sums stay on the device until then: reading a number from a GPU during the step would
stall it. All ranks must record the same names, so a rank without data records zeros through its dummy
micro-batches.

Lengths of samples are few and are gathered for their distribution. There may be millions of tokens:
|log pi / mu| is counted in fixed buckets on the device, and the counts are summed with the other totals.

Shape suffixes: S sampled tokens, K buckets, N samples, B samples of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import PackedBatch, num_targets
from trainer.batching.routes import FaultKind
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.metrics.lag import PartTable
from trainer.metrics.named_means import NamedMeans
from trainer.objectives import SampledTokens, TokenLosses
from trainer.objectives.importance import MAX_EXPONENT, ess_ratio

_LOWEST, _DECADES, _PER_DECADE = 1e-7, 9, 32
NUM_BUCKETS = _DECADES * _PER_DECADE + 2
"""The first bucket is 0 to 1e-7; then 32 for each power of ten, so 7.5 % wide, up to 100; the last is
above."""
PERCENTILES = (10, 50, 90, 99)


class MagnitudeHistogram:
    """Counts of magnitudes by size, kept on the device until the end of the step."""

    def __init__(self) -> None:
        self.counts_K: Tensor | None = None
        self._max: Tensor | None = None

    def add(self, values_S: Tensor, weights_S: Tensor) -> None:
        """Counts |values| with their weights, which may be 0."""
        sizes_S = values_S.abs().float()
        decades_S = torch.log10(sizes_S.clamp_min(1e-30)) - math.log10(_LOWEST)
        # Numbers that are not finite belong to the last bucket.
        at_S = (decades_S.nan_to_num(nan=1e9) * _PER_DECADE).floor().clamp(-1, NUM_BUCKETS - 2).long() + 1
        if self.counts_K is None:
            self.counts_K = torch.zeros(NUM_BUCKETS, dtype=torch.float64, device=values_S.device)
            self._max = torch.zeros((), dtype=torch.float32, device=values_S.device)
        # Not bincount, which synchronizes with a GPU to find the largest index.
        self.counts_K.index_add_(0, at_S, weights_S.double())
        assert self._max is not None
        largest = torch.where(weights_S > 0, sizes_S, 0.0).nan_to_num(nan=torch.inf)
        self._max = torch.maximum(self._max, torch.cat([largest, self._max[None]]).amax())

    @property
    def on_host_K(self) -> Tensor:
        """The counts, float64 on the CPU; zeros if nothing was added."""
        counts_K = self.counts_K
        return torch.zeros(NUM_BUCKETS, dtype=torch.float64) if counts_K is None else counts_K.cpu()

    @property
    def largest(self) -> float:
        return 0.0 if self._max is None else float(self._max)


def percentile_of_counts(counts_K: NDArray[np.float64], percent: float) -> float:
    """A percentile of the magnitudes in a MagnitudeHistogram: the upper end of its bucket.

    Infinite above 100. `counts_K` must not be all zero.
    """
    reached_K = np.cumsum(counts_K)
    bucket = int(np.searchsorted(reached_K, reached_K[-1] * percent / 100))
    if bucket >= NUM_BUCKETS - 1:
        return math.inf
    return _LOWEST * 10 ** (bucket / _PER_DECADE)


def length_metrics(response_B: NDArray[np.float64], prompt_B: NDArray[np.float64]) -> dict[str, Any]:
    """Percentiles and largest values of the lengths of a step's samples; nothing for no samples."""
    if len(response_B) == 0:
        return {}
    found = {
        f"response_length_p{percent}": value
        for percent, value in zip(PERCENTILES, np.percentile(response_B, PERCENTILES).tolist(), strict=True)
    }
    return found | {
        "response_length_max": float(response_B.max()),
        "prompt_tokens_max": float(prompt_B.max()),
    }


def as_parts(vectors: Sequence[Tensor]) -> Tensor:
    """Joins several vectors, preceded by their lengths, into one float64 CPU vector, for a single gather."""
    lengths = torch.tensor([len(vector) for vector in vectors], dtype=torch.float64)
    return torch.cat([lengths, *(vector.double().cpu() for vector in vectors)])


def joined_parts(gathered: Tensor, *, num_vectors: int) -> list[Tensor]:
    """Splits the gathered `as_parts` of all ranks: returns each vector, concatenated over the ranks."""
    parts: list[list[Tensor]] = [[] for _ in range(num_vectors)]
    at = 0
    while at < len(gathered):
        lengths = [int(length) for length in gathered[at : at + num_vectors].tolist()]
        at += num_vectors
        for part, length in zip(parts, lengths, strict=True):
            part.append(gathered[at : at + length])
            at += length
    return [torch.cat(part) for part in parts]


class StepTotals:
    """Collects sums, then gives their means.

    RECORDING: add*(), recorded(), observe() -> reduce() -> READABLE: total(), mean(), count(), metrics()
    """

    def __init__(self, seeded: Iterable[str] = ()) -> None:
        """`seeded`: further names that exist on every rank, even on one without data."""
        self._sums: dict[str, Tensor | float] = dict.fromkeys((*_SEEDED, *seeded), 0.0)
        self._counts: dict[str, Tensor | float] = dict.fromkeys((*_SEEDED, *seeded), 0.0)
        self._log_w: list[Tensor] = []
        self._mean_log_w: list[Tensor] = []
        self._lengths: list[tuple[int, int]] = []
        """Response and prompt of each sample."""
        self._mismatch = MagnitudeHistogram()
        self._named = NamedMeans()
        self.parts = PartTable()
        """The samples, with `buffer.overdue=close`."""

    def add(self, name: str, total: Tensor | float, *, count: Tensor | float = 1.0) -> None:
        """Adds to a sum and to its count."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_vector(
        self, name: str, values: Tensor, *, chosen: Tensor | None = None, live: bool = True
    ) -> None:
        """Adds a vector's sum, with its length as the count. `chosen`: bool, only these entries. A dummy
        micro-batch (not `live`) adds zeros."""
        count: Tensor | int = len(values)
        if chosen is not None:
            values, count = torch.where(chosen, values, 0.0), chosen.sum()
        self.add(name, values.sum() if live else 0.0, count=count if live else 0)

    def add_all(self, sums: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        for name, (total, count) in sums.items():
            self.add(name, total, count=count)

    def recorded(self, group: Sequence[Trajectory], *, shaped: Sequence[Trajectory] = ()) -> None:
        """Records the rewards, lengths and other numbers of a group's samples.

        Greedy samples are recorded separately: they are not trained on. `shaped`: the same samples with
        shaped rewards; empty if advantages are computed from the task's.
        """
        learned = [trajectory for trajectory in group if not trajectory.is_greedy]
        for trajectory in group:
            if trajectory.is_greedy:
                self.add("greedy_reward", trajectory.reward)
        targets = [num_targets(trajectory) for trajectory in learned]
        rewards = {"reward": learned}
        if shaped:
            rewards["shaped_reward"] = [trajectory for trajectory in shaped if not trajectory.is_greedy]
        numbers: dict[str, Sequence[float]] = {
            "response_tokens": targets,
            "prompt_tokens": [t.num_tokens - num for t, num in zip(learned, targets, strict=True)],
            "truncated_fraction": [t.finish_reason.is_truncated for t in learned],
            "turns": [t.num_turns for t in learned],
            "segments": [len(t.segments) or 1 for t in learned],
            "sample_generation_s": [t.generation_s for t in learned],
            "sample_reward_s": [t.reward_s for t in learned],
        }
        for name, samples in rewards.items():
            numbers[name] = [trajectory.reward for trajectory in samples]
            numbers[f"{name}_square"] = [trajectory.reward * trajectory.reward for trajectory in samples]
        self.add("num_groups", 1.0)
        for name, values in numbers.items():
            self.add(name, float(sum(values)), count=float(len(learned)))
        for trajectory, num in zip(learned, targets, strict=True):
            self.add(_FINISHED[trajectory.finish_reason], 1.0)
            self._named.add(trajectory, num_targets=num)
            self._lengths.append((num, trajectory.num_tokens - num))

    def skipped(self, samples: Iterable[TrainingSample]) -> None:
        """Counts samples that are not run in the normalizer."""
        for sample in samples:
            self.add("counted_tokens", float(num_targets(sample.trajectory) + sample.num_masked))
            self.add("counted_seqs", 1.0)

    def trained(self, batch: PackedBatch, *, live: bool) -> None:
        """Records the size of a micro-batch. A dummy (not `live`) adds zeros."""
        self.add("num_tokens", float(batch.num_tokens if live else 0))
        self.add("num_rows", float(batch.num_rows if live else 0))
        self.add("num_microbatches", float(live))

    @torch.no_grad()
    def observe(
        self, tokens: SampledTokens, losses: TokenLosses, *, counted: Sequence[Tensor], live: bool
    ) -> None:
        """Records the diagnostics of every objective and the objective's own.

        `counted`: tokens and samples that count in the normalizer. A dummy (not `live`) adds zeros.
        """
        num_tokens, num_seqs = counted
        self.add("counted_tokens", num_tokens if live else 0.0)
        self.add("counted_seqs", num_seqs if live else 0.0)
        log_ratio_S = tokens.log_ratio_S
        # k3: exp(x) - 1 - x with x the log-ratio of policy to behavior policy. It estimates KL(behavior ||
        # policy) and is never negative.
        kl_S = torch.expm1(log_ratio_S.clamp(-MAX_EXPONENT, MAX_EXPONENT)) - log_ratio_S
        self.add_vector("kl_k3", kl_S, live=live)
        self.add_vector("entropy", tokens.entropy_S, live=live)
        # At lag 0 engine and trainer have the same weights: a difference comes only from numerics.
        same_S = tokens.lag_S == 0
        num_same = same_S.sum() if live else 0
        self.add("mismatch_abs", (log_ratio_S.abs() * same_S).sum() if live else 0.0, count=num_same)
        self.add("mismatch_k3", (kl_S * same_S).sum() if live else 0.0, count=num_same)
        if live:
            self._mismatch.add(log_ratio_S.detach(), same_S)
        # Both fractions exist for every objective, so that runs can be compared. By default nothing is
        # clipped and all tokens are kept.
        fractions = {
            "clipped_fraction": torch.zeros_like(log_ratio_S),
            "kept_fraction": torch.ones_like(log_ratio_S),
        }
        for name, values in (fractions | losses.means).items():
            values = values.detach().to(log_ratio_S.dtype)
            self.add_vector(name, values, chosen=losses.chosen.get(name), live=live)
        log_w, means = (
            tokens.of_trained(value_N) for value_N in (tokens.log_w_N, tokens.mean_N(log_ratio_S.detach()))
        )
        self._log_w.append(log_w if live else log_w[:0])
        self._mean_log_w.append(means if live else means[:0])
        # Weights of tokens are summed: gathering them from all ranks would cost as much as the data.
        w_S = log_ratio_S.detach().double().clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        self.add_vector("token_w", w_S, live=live)
        self.add_vector("token_w_square", w_S.square(), live=live)

    @torch.no_grad()
    def observe_beyond(self, tokens: SampledTokens) -> None:
        """Records the tokens beyond the staleness bound, of which there are some."""
        assert tokens.beyond_S is not None
        log_ratio_S, beyond_S = tokens.log_ratio_S, tokens.beyond_S
        w_S = log_ratio_S.double().clamp(-MAX_EXPONENT, MAX_EXPONENT).exp() * beyond_S
        values = (log_ratio_S.abs() * beyond_S, w_S, w_S.square(), tokens.is_extreme_S)
        for name, value_S in zip(OF_BEYOND, values, strict=True):
            self.add(name, value_S.sum(), count=beyond_S.sum())

    def part_metrics(self, ranks: Ranks, *, beyond: str) -> dict[str, Any]:
        """The metrics of `buffer.overdue=close`. Collective. `beyond`: `staleness.beyond`."""
        found = self.parts.metrics(ranks)
        if beyond == "mask":  # tokens beyond the bound have no log-probs
            return found
        total, square = self.total("beyond_w"), self.total("beyond_w_square")
        found["beyond_log_ratio_abs"] = self.mean("beyond_log_ratio")
        found["beyond_ess_ratio"] = total**2 / (square * self.count("beyond_w")) if square else 1.0
        if beyond == "ratio":
            num_sampled = self.total("response_tokens")
            found["masked_share"] = self.total("beyond_extreme") / num_sampled if num_sampled else 0.0
        return found

    def route_metrics(self) -> dict[str, float]:
        """The samples that router replay leaves out: their number by kind of fault, `unrouted_share` of the
        step's sampled tokens."""
        num_sampled = self.total("response_tokens")
        found = {kind.value: self.total(kind) for kind in FaultKind}
        return found | {"unrouted_share": self.total("unrouted_tokens") / num_sampled if num_sampled else 0.0}

    def reduce(self, ranks: Ranks) -> None:
        """Sums over ranks. Collective; call once."""
        names = sorted(self._sums)
        values = [self._sums[n] for n in names] + [self._counts[n] for n in names]
        sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
        totals = ranks.sum(torch.cat([sums, self._mismatch.on_host_K])).tolist()
        self._sums = dict(zip(names, totals[: len(names)], strict=True))
        self._counts = dict(zip(names, totals[len(names) : 2 * len(names)], strict=True))
        self._mismatch_K = np.array(totals[-NUM_BUCKETS:])
        self._named.reduce(ranks)
        log_w, mean_log_w = (
            torch.cat(parts) if parts else torch.zeros(0) for parts in (self._log_w, self._mean_log_w)
        )
        lengths = torch.tensor(self._lengths, dtype=torch.float64).reshape(-1, 2)
        parts = as_parts([log_w, mean_log_w, *lengths.T, torch.tensor([self._mismatch.largest])])
        self.log_w_B, self._mean_log_w_B, self._response_B, self._prompt_B, self._largest = joined_parts(
            ranks.gather(parts), num_vectors=5
        )
        """Summed log-ratio of every sample of the step, float64, the same on all ranks."""

    def total(self, name: str) -> float:
        """The sum; 0 if nothing was recorded."""
        return float(self._sums.get(name, 0.0))

    def mean(self, name: str) -> float:
        """Sum over count; 0 if nothing was recorded."""
        count = float(self._counts.get(name, 0.0))
        return self.total(name) / count if count else 0.0

    def count(self, name: str) -> float:
        return float(self._counts.get(name, 0.0))

    def ess_ratios(self) -> dict[str, float]:
        """Level -> effective sample size over the number of weights: of samples (products, and geometric
        means over their tokens) and of tokens; 1 without tokens."""
        total, square = self.total("token_w"), self.total("token_w_square")
        return {
            "sequence": ess_ratio(self.log_w_B),
            "geometric": ess_ratio(self._mean_log_w_B),
            "token": total**2 / (square * self.count("token_w")) if square else 1.0,
        }

    def metrics(self) -> dict[str, Any]:
        """The metrics of the step: means, counts, and statistics of the samples' importance weights.

        Numbers, and by name in dicts: `finish_reasons`, `reward_parts`, `sample_metrics`, `by_label`.
        """
        metrics: dict[str, Any] = {name: self.mean(name) for name in self._sums if name not in _HIDDEN}
        metrics.update({name: self.total(name) for name in _COUNTS})
        if self.count("mismatch_abs") == 0:  # no token at lag 0: the mismatch is unknown, not zero
            metrics.pop("mismatch_abs", None)
            metrics.pop("mismatch_k3", None)
        else:
            metrics["mismatch_abs_max"] = largest = float(self._largest.max())
            # The percentile is the end of a bucket, which may be above the maximum.
            metrics["mismatch_abs_p99"] = min(largest, percentile_of_counts(self._mismatch_K, 99))
        reward = self.mean("reward")
        variance = self.mean("reward_square") - reward * reward  # of floats, ** raises OverflowError
        log_w_B = self.log_w_B
        metrics.update(
            num_sequences=self.count("reward"),
            shared_share=shared_share(num_tokens=self.total("num_tokens"), num_rows=self.total("num_rows")),
            reward_std=max(variance, 0.0) ** 0.5,
            **{ESS_NAMES[level]: value for level, value in self.ess_ratios().items()},
            log_w_mean=float(log_w_B.mean()) if len(log_w_B) else 0.0,
            log_w_std=float(log_w_B.std(correction=0)) if len(log_w_B) else 0.0,
            finish_reasons={
                reason.value: self.total(name) / max(1.0, self.count("reward"))
                for reason, name in _FINISHED.items()
            },
        )
        metrics |= length_metrics(self._response_B.numpy(), self._prompt_B.numpy())
        return metrics | self._named.metrics()


def shared_share(*, num_tokens: float, num_rows: float) -> float:
    """Share of tokens that were not computed, because their prefix is shared; 0 without tokens."""
    return 1 - num_rows / num_tokens if num_tokens else 0.0


ESS_NAMES = {"sequence": "ess_ratio", "geometric": "ess_ratio_geometric", "token": "ess_ratio_token"}
"""Level -> name of the metric."""
OF_BEYOND = ("beyond_log_ratio", "beyond_w", "beyond_w_square", "beyond_extreme")
"""Names that `observe_beyond` adds to."""
OF_STEPS = ("step_reward", "step_reward_sum")
"""Names of the rewards of steps within the samples, and of their sum over a sample."""
_COUNTS = ("num_groups", "zero_advantage_groups", "num_tokens", "num_microbatches")
_FINISHED: dict[FinishReason, str] = {
    reason: f"finished_{reason.value}" for reason in FinishReason if reason is not FinishReason.ABORT
}
_HIDDEN = (
    "loss",
    "reward_square",
    "counted_tokens",
    "counted_seqs",
    "num_rows",
    "model_flops",
    "token_w",
    "token_w_square",
    "shaped_reward_square",
    "unrouted_tokens",
    *FaultKind,
    *OF_BEYOND,
    *(f"{name}{square}" for name in OF_STEPS for square in ("", "_square")),
    *_FINISHED.values(),
)
_SEEDED = (
    *_COUNTS,
    *_HIDDEN,
    *("reward", "response_tokens", "prompt_tokens", "truncated_fraction"),
    *("turns", "segments", "sample_generation_s", "sample_reward_s"),
)
