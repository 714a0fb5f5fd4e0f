"""Lays sequences of different lengths end to end and cuts them into micro-batches under a token budget.

The cuts are a pure function of recorded order and budget (next fit; a sequence is never split), never of when
a group arrived, so a step that is served again gives bitwise the same gradient. Next fit also streams: a
micro-batch is complete as soon as the next sequence does not fit. With several ranks the whole step is
divided by cost instead (`balancer.py`).

All ranks run equal numbers of micro-batches (`in_lockstep`), because FSDP2's collectives hang if one rank
runs fewer. Before each micro-batch an all-reduce tells every rank if any rank has one left. A rank that has
none left runs a dummy, whose contribution the caller multiplies by zero. The same all-reduce tells if a rank
abandons the step (`Ranks.abandonable`), so that all stop between the same two. A micro-batch is requested
only after the caller has received the previous one, so none waits for its successor. On a GPU it is
nevertheless prepared and copied while the previous one runs (`device_copies.py`).

The budget stands for memory: a prefix that sequences of a micro-batch have in common is computed once, and
its shared tokens count one eighth (`shared_prefixes.py`).

Shape suffixes: T tokens of a micro-batch, U rows that the model computes for them, S sampled tokens (loss
mask 1), N sequences.

Alignment: entry t of a per-token quantity belongs to token t given the tokens before it in its own sequence.
A sequence's first token has no prefix, so it is never in the loss mask, even if a policy sampled it from an
empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.attention_layout import AttentionLayout
from trainer.batching.device_copies import copied
from trainer.batching.shared_prefixes import PrefixFinder, SharedRows, budget_size
from trainer.distributed.ranks import Ranks


class SampleCounts(NamedTuple):
    """What a sequence counts for in the divisors of normalizers, where that is not its trained tokens."""

    num_masked: int
    """Sampled tokens that are context only, because they are beyond the staleness bound; those of a sample of
    several sequences count with the first."""
    sample_length: int
    """Tokens of its whole sample: trained and masked ones of all of the sample's sequences."""
    num_samples: int
    """1 for the first sequence of a sample, else 0."""
    sample_index: int
    """Of the sample in its group."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSample:
    """One trajectory with its advantage, its group's position in the step, and its lag.

    Only trajectories of one segment are packed (`segments.py` splits the others).
    """

    trajectory: Trajectory
    advantage: float | NDArray[np.float64]
    """One number for all its tokens, or a float64 array [num_tokens]."""
    group: int
    """Position of its group in the step, counted over all ranks."""
    lag: int | NDArray[np.int64] = 0
    """Optimizer steps since the weights that sampled its tokens: a number, or an int64 array [num_tokens]."""
    index: int = 0
    """Of the sample in its group; read if the sample has several segments."""
    beyond: NDArray[np.bool_] | None = None
    """bool [num_tokens]: trained tokens that are beyond the staleness bound; None: none."""
    counts: SampleCounts | None = None
    """None: the trajectory is a whole sample, all of whose sampled tokens are trained on."""

    @property
    def resolved_counts(self) -> SampleCounts:
        return self.counts or SampleCounts(0, num_targets(self.trajectory), 1, self.index)


MicroBatch = tuple[TrainingSample, ...]
"""Samples that run through the model together; `collate` turns them into a PackedBatch."""


def is_target(trajectory: Trajectory) -> NDArray[np.bool_]:
    """bool [num_tokens]: tokens that are trained on, which are sampled tokens that have a prefix."""
    target_T = trajectory.loss_mask.astype(bool)
    for part in trajectory.segment_slices:
        target_T[part.start] = False
    return target_T


def num_targets(trajectory: Trajectory) -> int:
    return int(np.count_nonzero(is_target(trajectory)))


class Packer:
    """Cuts a stream of groups into micro-batches: `microbatches`, made of these two steps:

    FILLING -> add() returns the micro-batches that became full -> flush() returns the rest -> FILLING
    """

    def __init__(
        self,
        *,
        budget_tokens: int,
        whole_groups: bool = False,
        one_sequence_per_microbatch: bool = False,
        shares_prefixes: bool = True,
    ) -> None:
        """`budget_tokens`: most tokens of a micro-batch.

        `whole_groups`: never split a group over two micro-batches.

        `one_sequence_per_microbatch`: every micro-batch is a single sequence.

        `shares_prefixes`: a prefix that sequences have in common is computed once (as in `collate`).
        """
        assert budget_tokens >= 1 and not (whole_groups and one_sequence_per_microbatch)
        self._budget = budget_tokens
        self._whole_groups = whole_groups
        self._one_sequence = one_sequence_per_microbatch
        self._shares_prefixes = shares_prefixes
        self._begin()

    def _begin(self) -> None:
        self._open: list[TrainingSample] = []
        self._used = 0
        self._finder = PrefixFinder()

    def microbatches(self, groups: Iterable[Sequence[TrainingSample]]) -> Iterator[MicroBatch]:
        """Yields each micro-batch as soon as it is full, and the rest at the end. Raises like `add`."""
        self._begin()
        for group in groups:
            yield from self.add(group)
        yield from self.flush()

    def add(self, group: Sequence[TrainingSample]) -> list[MicroBatch]:
        """Adds the next group in recorded order; returns the micro-batches that it completed.

        Raises ConfigError if a sequence (with `whole_groups`: a group) is longer than the budget.
        """
        done: list[MicroBatch] = []
        units = [list(group)] if self._whole_groups else [[sample] for sample in group]
        for unit in units:
            size = self._size(unit)
            if self._used + size > self._budget:
                done += self.flush()
                size = self._size(unit)
            if size > self._budget:
                what = "group" if self._whole_groups else "sequence"
                raise ConfigError(
                    f"a {what} of {size} tokens does not fit trainer.tokens_per_microbatch={self._budget}: "
                    f"raise it to at least {size}"
                )
            self._open += unit
            self._used += size
            if self._shares_prefixes:
                for sample in unit:
                    self._finder.append(sample.trajectory.tokens)
            if self._used == self._budget or self._one_sequence:
                done += self.flush()
        return done

    def flush(self) -> list[MicroBatch]:
        """Returns the unfinished micro-batch, if there is one, and starts a new one."""
        rest = [tuple(self._open)] if self._open else []
        self._begin()
        return rest

    def _size(self, unit: Sequence[TrainingSample]) -> int:
        """The part of the open micro-batch's budget that these samples need."""
        if not self._shares_prefixes:
            return sum(sample.trajectory.num_tokens for sample in unit)
        size, finder = 0, self._finder if len(unit) == 1 else self._finder.copy()
        for sample in unit:
            tokens = sample.trajectory.tokens
            size += budget_size(len(tokens), prefix=finder.find(tokens).length)
            if len(unit) > 1:
                finder.append(tokens)
        return size


class DivisorCounts(NamedTuple):
    """`SampleCounts` of the sequences of a micro-batch: int64 [N] each."""

    num_masked_N: Tensor
    sample_length_N: Tensor
    num_samples_N: Tensor
    sample_N: Tensor
    """A number for each sample, which its sequences in this micro-batch share."""


class DeviceRows(NamedTuple):
    """`SharedRows` on the device."""

    row_T: Tensor
    token_U: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """One micro-batch as flat tensors on one device."""

    tokens_T: Tensor
    """int64 token ids."""
    positions_T: Tensor
    """int64, from 0 in each sequence."""
    segments_T: Tensor
    """int64 index in 0..N-1 of each token's sequence."""
    behavior_logp_T: Tensor
    """float32 log-prob under the policy that sampled the token; 0 outside the loss mask."""
    versions_T: Tensor
    """int32 version of the weights that sampled the token; NOT_SAMPLED elsewhere."""
    lags_T: Tensor
    """int64 optimizer steps since the weights of that version; meaningless outside the loss mask."""
    advantages_T: Tensor
    """float64 advantage of each token."""
    cu_seqlens: Tensor
    """int32 [N + 1]: start of each sequence, then the end of the last."""
    rewards_N: Tensor
    """float64 reward of each sequence."""
    groups_N: Tensor
    """int64 position of each sequence's group in the step."""
    truncated_N: Tensor
    """bool: the sequence ended at the length limit."""
    sampled_S: Tensor
    """int64 [S] indices into T of the tokens that are trained on."""
    lengths: tuple[int, ...]
    """Number of tokens of each sequence; Python ints, so reading them does not synchronize with the
    device."""
    shared: SharedRows | None = None
    """The rows that the model computes; None: one for each token."""
    beyond_T: Tensor | None = None
    """bool: trained tokens that are beyond the staleness bound; None: none."""
    counts: DivisorCounts | None = None
    """None: each sequence is a sample, all of whose sampled tokens are trained on."""

    @cached_property
    def rows(self) -> DeviceRows | None:
        if self.shared is None:
            return None
        row_T, token_U = copied([self.shared.row_T, self.shared.token_U], self.tokens_T.device)
        return DeviceRows(row_T=row_T, token_U=token_U)

    @cached_property
    def attention_layout(self) -> AttentionLayout:
        return AttentionLayout(
            lengths=self.lengths,
            device=self.tokens_T.device,
            shared=self.shared,
            row_T=None if self.rows is None else self.rows.row_T,
        )

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def num_rows(self) -> int:
        """Number of rows that the model computes (U): tokens, but a shared prefix counts once."""
        return self.num_tokens if self.shared is None else len(self.shared.token_U)


def split_by_sequence(value_S: Tensor, batch: PackedBatch) -> list[NDArray[np.float64]]:
    """Splits a value [S] per sampled token into one float64 array per sequence, on the host."""
    length_N = torch.bincount(batch.segments_T[batch.sampled_S], minlength=batch.num_sequences)
    return np.split(value_S.double().cpu().numpy(), length_N.cumsum(0)[:-1].cpu().numpy())


def collate(
    samples: Sequence[TrainingSample], *, device: torch.device | str = "cpu", shares_prefixes: bool = True
) -> PackedBatch:
    """Lays the samples' trajectories end to end as tensors on `device`. Needs at least one sample.

    `shares_prefixes`: False computes every token of every sequence, for gradients of single sequences.
    """
    assert all(len(sample.trajectory.segments) <= 1 for sample in samples)
    trajectories = [sample.trajectory for sample in samples]
    lengths = [t.num_tokens for t in trajectories]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts, total = bounds[:-1], int(bounds[-1])

    def of_tokens(values: Sequence[Any], dtype: type) -> NDArray[Any]:
        """One number for each token, from one number or one array for each sample."""
        if not any(isinstance(value, np.ndarray) for value in values):
            return np.repeat(np.asarray(values, dtype=dtype), lengths)
        return np.concatenate(
            [
                np.broadcast_to(value, (n,)) if np.ndim(value) == 0 else value
                for value, n in zip(values, lengths, strict=True)
            ],
            dtype=dtype,
        )

    arrays = {
        "tokens_T": np.concatenate([t.tokens for t in trajectories]).astype(np.int64),
        "positions_T": np.arange(total) - np.repeat(starts, lengths),
        "segments_T": np.repeat(np.arange(len(lengths)), lengths),
        "behavior_logp_T": np.concatenate([t.logprobs for t in trajectories]),
        "versions_T": np.concatenate([t.versions for t in trajectories]),
        "lags_T": of_tokens([s.lag for s in samples], np.int64),
        "advantages_T": of_tokens([s.advantage for s in samples], np.float64),
        "cu_seqlens": bounds.astype(np.int32),
        "rewards_N": np.array([t.reward for t in trajectories], dtype=np.float64),
        "groups_N": np.array([s.group for s in samples], dtype=np.int64),
        "truncated_N": np.array([t.finish_reason.is_truncated for t in trajectories]),
        "sampled_S": np.flatnonzero(np.concatenate([is_target(t) for t in trajectories])),
    }
    if any(sample.beyond is not None for sample in samples):
        arrays["beyond_T"] = of_tokens([False if s.beyond is None else s.beyond for s in samples], bool)
    tensors = dict(zip(arrays, copied([*arrays.values()], device), strict=True))
    counts = None
    if any(sample.counts is not None for sample in samples):
        table_N = np.array([sample.resolved_counts for sample in samples], dtype=np.int64)
        known: dict[tuple[int, int], int] = {}
        for number, sample in enumerate(samples):
            place = (sample.group, sample.counts.sample_index) if sample.counts else (-1, number)
            table_N[number, -1] = known.setdefault(place, len(known))
        counts = DivisorCounts(*copied([*np.ascontiguousarray(table_N.T)], device))
    return PackedBatch(
        **tensors,
        lengths=tuple(lengths),
        shared=SharedRows.of([t.tokens for t in trajectories]) if shares_prefixes else None,
        counts=counts,
    )


def in_lockstep(
    microbatches: Iterable[MicroBatch], ranks: Ranks, *, shares_prefixes: bool = True
) -> Iterator[tuple[PackedBatch, bool]]:
    """Yields (batch, live): this rank's micro-batches with live=True, then dummies with live=False.

    `shares_prefixes`: see `collate`.

    Dummies follow for as long as another rank still has micro-batches. Collective. Raises
    IncompleteStepError on every rank if one abandons the step.
    """
    remaining = iter(microbatches)
    while True:
        microbatch = next(remaining, None)
        if not ranks.any_left(microbatch is not None):
            return
        ranks.place.next_microbatch()
        if microbatch is None:
            yield collate([_DUMMY], device=ranks.device), False
        else:
            yield collate(microbatch, device=ranks.device, shares_prefixes=shares_prefixes), True


_DUMMY = TrainingSample(
    trajectory=Trajectory(
        tokens=np.zeros(2, dtype=np.int32),
        loss_mask=np.array([0, 1], dtype=np.uint8),
        logprobs=np.zeros(2, dtype=np.float32),
        versions=np.array([-1, 0], dtype=np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    ),
    advantage=0.0,
    group=0,
)
"""The shortest trajectory with one sampled token."""
