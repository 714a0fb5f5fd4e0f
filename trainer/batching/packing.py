"""Lays sequences of different lengths end to end and cuts them into micro-batches under a token budget.

The cuts are a pure function of recorded order and budget (next fit; a sample is never split), never of when
a group arrived, so a step that is served again has the same sums: on a CPU its gradient is bitwise the same,
while some CUDA kernels add up in an order of their own. Next fit also streams: a micro-batch is complete as
soon as the next sample does not fit. With several ranks the whole step is divided by cost instead
(`balancer.py`).

All ranks run equal numbers of micro-batches (`in_lockstep`), because FSDP2's collectives hang if one rank
runs fewer. Before each micro-batch an all-reduce tells every rank if any rank has one left. A rank that has
none left runs a dummy, whose contribution the caller multiplies by zero. The same all-reduce tells if a rank
abandons the step (`Ranks.abandonable`), so that all stop between the same two. A micro-batch is requested
only after the caller has received the previous one, so none waits for its successor. On a GPU it is
nevertheless prepared and copied while the previous one runs (`device_copies.py`).

The budget stands for memory: a prefix that sequences of a micro-batch have in common is computed once, and
its shared tokens count one eighth (`shared_prefixes.py`).

A sample of several segments is several sequences for the model and one sample for everything else
(`segments.py`). If it alone exceeds the budget, it is set aside.

Shape suffixes: T tokens of a micro-batch, U rows that the model computes for them, S sampled tokens (loss
mask 1), N samples, L layers with experts, K experts of a token.

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
from trainer.batching.context_part import ContextPart
from trainer.batching.device_copies import copied
from trainer.batching.routes import experts_of_segments, rows_of
from trainer.batching.sample_messages import spread_microbatch
from trainer.batching.shared_prefixes import InputSequence, PrefixFinder, SharedRows, budget_size
from trainer.batching.training_sample import MicroBatch, TrainingSample
from trainer.distributed.context import ContextGroup
from trainer.distributed.ranks import Ranks


def is_target(trajectory: Trajectory) -> NDArray[np.bool_]:
    """bool [num_tokens]: tokens that are trained on, which are sampled tokens that have a prefix."""
    target_T = trajectory.loss_mask.astype(bool)
    for part in trajectory.segment_slices:
        target_T[part.start] = False
    return target_T


def num_targets(trajectory: Trajectory) -> int:
    return int(np.count_nonzero(is_target(trajectory)))


def sequences_of(trajectory: Trajectory) -> list[InputSequence]:
    """The sequences that the model gets: one for each segment."""
    parts = zip(trajectory.segment_slices, experts_of_segments(trajectory), strict=True)
    return [InputSequence(tokens=trajectory.tokens[part], experts_TLK=experts) for part, experts in parts]


def is_too_long(sample: TrainingSample, *, budget_tokens: int, shares_prefixes: bool) -> bool:
    """The sample does not fit into a micro-batch, but its segments may."""
    segments = sample.trajectory.segments
    if len(segments) <= 1 or max(segments) > budget_tokens or sample.trajectory.num_tokens <= budget_tokens:
        return False
    return not shares_prefixes or _size(sequences_of(sample.trajectory), PrefixFinder()) > budget_tokens


def too_long_of(
    samples: Sequence[TrainingSample], *, budget_tokens: int, shares_prefixes: bool
) -> list[TrainingSample]:
    """Those of the samples that are too long for a micro-batch."""
    return [
        s for s in samples if is_too_long(s, budget_tokens=budget_tokens, shares_prefixes=shares_prefixes)
    ]


def _size(sequences: Sequence[InputSequence], finder: PrefixFinder) -> int:
    """The part of a micro-batch's budget that these sequences need; more than one are appended to
    `finder`."""
    size = 0
    for sequence in sequences:
        size += budget_size(sequence.num_tokens, prefix=finder.find(sequence).length)
        if len(sequences) > 1:
            finder.append(sequence)
    return size


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

        `one_sequence_per_microbatch`: every micro-batch is a single sample.

        `shares_prefixes`: a prefix that sequences have in common is computed once (as in `collate`).
        """
        assert budget_tokens >= 1 and not (whole_groups and one_sequence_per_microbatch)
        self._budget = budget_tokens
        self._whole_groups = whole_groups
        self._one_sequence = one_sequence_per_microbatch
        self._shares_prefixes = shares_prefixes
        self.set_aside: list[TrainingSample] = []
        """Samples of the last `microbatches` that are in none of them, because they are too long."""
        self._begin()

    def _begin(self) -> None:
        self._open: list[TrainingSample] = []
        self._used = 0
        self._finder = PrefixFinder()

    def microbatches(self, groups: Iterable[Sequence[TrainingSample]]) -> Iterator[MicroBatch]:
        """Yields each micro-batch as soon as it is full, and the rest at the end. Raises like `add`."""
        self.set_aside = []
        self._begin()
        for group in groups:
            yield from self.add(group)
        yield from self.flush()

    def add(self, group: Sequence[TrainingSample]) -> list[MicroBatch]:
        """Adds the next group in recorded order; returns the micro-batches that it completed.

        Raises ConfigError if a sequence (with `whole_groups`: a group) is longer than the budget.
        """
        done: list[MicroBatch] = []
        units = [list(group)] if self._whole_groups else self._fitting(group)
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
                    for sequence in sequences_of(sample.trajectory):
                        self._finder.append(sequence)
            if self._used == self._budget or self._one_sequence:
                done += self.flush()
        return done

    def flush(self) -> list[MicroBatch]:
        """Returns the unfinished micro-batch, if there is one, and starts a new one."""
        rest = [tuple(self._open)] if self._open else []
        self._begin()
        return rest

    def _fitting(self, group: Sequence[TrainingSample]) -> list[list[TrainingSample]]:
        """The samples as units of one, without those that it sets aside."""
        too_long = too_long_of(group, budget_tokens=self._budget, shares_prefixes=self._shares_prefixes)
        if too_long and self._one_sequence:  # for a baseline of the group, its samples follow one another
            too_long = list(group)
        self.set_aside += too_long
        return [[sample] for sample in group if sample not in too_long]

    def _size(self, unit: Sequence[TrainingSample]) -> int:
        """The part of the open micro-batch's budget that these samples need."""
        if not self._shares_prefixes:
            return sum(sample.trajectory.num_tokens for sample in unit)
        sequences = [sequence for sample in unit for sequence in sequences_of(sample.trajectory)]
        return _size(sequences, self._finder if len(sequences) == 1 else self._finder.copy())


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
    samples_T: Tensor
    """int64 index in 0..N-1 of each token's sample."""
    behavior_logp_T: Tensor
    """float32 log-prob under the policy that sampled the token; 0 outside the loss mask."""
    versions_T: Tensor
    """int32 version of the weights that sampled the token; NOT_SAMPLED elsewhere."""
    lags_T: Tensor
    """int64 optimizer steps since the weights of that version; meaningless outside the loss mask."""
    advantages_T: Tensor
    """float64 advantage of each token."""
    rewards_N: Tensor
    """float64 reward of each sample."""
    groups_N: Tensor
    """int64 position of each sample's group in the step."""
    truncated_N: Tensor
    """bool: the sample ended at the length limit."""
    sampled_S: Tensor
    """int64 [S] indices into T of the tokens that are trained on."""
    lengths: tuple[int, ...]
    """Number of tokens of each sequence; Python ints, so reading them does not synchronize with the
    device."""
    sample_lengths: tuple[int, ...]
    """Number of tokens of each sample, which is one sequence or several that follow one another."""
    shared: SharedRows | None = None
    """The rows that the model computes; None: one for each token."""
    beyond_T: Tensor | None = None
    """bool: trained tokens that are beyond the staleness bound; None: none."""
    num_masked_N: Tensor | None = None
    """int64: `TrainingSample.num_masked`; None: none is masked."""
    is_continued: bool = False
    """It ends with a part of a sample whose next part is in the next micro-batch."""
    samples: Sequence[TrainingSample] = ()
    """Those that it was made of, for what is not among the tensors (labels, further arrays); empty if it was
    not made by `collate`."""
    routes_ULK: Tensor | None = None
    """int16: the experts of each row in each layer that has experts, `LIVE` where none are recorded; None:
    the model routes all rows."""
    context: ContextPart | None = None
    """The rows that this rank computes; None: all."""

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
    def target_C(self) -> Tensor:
        """int64 indices into T of the sampled tokens whose logits this rank computes."""
        return self.sampled_S if self.context is None else self.context.target_C

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_samples(self) -> int:
        return len(self.sample_lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def num_rows(self) -> int:
        """Number of rows that the model computes (U): tokens, but a shared prefix counts once."""
        return self.num_tokens if self.shared is None else len(self.shared.token_U)

    def sum_N(self, value_S: Tensor) -> Tensor:
        """[N] sum of a value [S] over each sample's sampled tokens."""
        return value_S.new_zeros(self.num_samples).index_add(0, self.samples_T[self.sampled_S], value_S)


def collate(
    samples: Sequence[TrainingSample],
    *,
    device: torch.device | str = "cpu",
    shares_prefixes: bool = True,
    context: ContextGroup | None = None,
) -> PackedBatch:
    """Lays the samples' trajectories end to end as tensors on `device`. Needs at least one sample.

    `shares_prefixes`: False computes every token of every sequence, for gradients of single sequences.
    `context`: the ranks that compute its rows together; None: this rank alone.
    """
    trajectories = [sample.trajectory for sample in samples]
    sequences = [sequence for trajectory in trajectories for sequence in sequences_of(trajectory)]
    lengths, sample_lengths = [s.num_tokens for s in sequences], [t.num_tokens for t in trajectories]
    shared = SharedRows.of(sequences) if shares_prefixes else None
    starts, total = np.cumsum(lengths) - lengths, sum(lengths)

    def of_tokens(values: Sequence[Any], dtype: type) -> NDArray[Any]:
        """One number for each token, from one number or one array for each sample."""
        if not any(isinstance(value, np.ndarray) for value in values):
            return np.repeat(np.asarray(values, dtype=dtype), sample_lengths)
        return np.concatenate(
            [
                np.broadcast_to(value, (n,)) if np.ndim(value) == 0 else value
                for value, n in zip(values, sample_lengths, strict=True)
            ],
            dtype=dtype,
        )

    arrays = {
        "tokens_T": np.concatenate([t.tokens for t in trajectories]).astype(np.int64),
        "positions_T": np.arange(total) - np.repeat(starts, lengths),
        "samples_T": np.repeat(np.arange(len(samples)), sample_lengths),
        "behavior_logp_T": np.concatenate([t.logprobs for t in trajectories]),
        "versions_T": np.concatenate([t.versions for t in trajectories]),
        "lags_T": of_tokens([s.lag for s in samples], np.int64),
        "advantages_T": of_tokens([s.advantage for s in samples], np.float64),
        "rewards_N": np.array([t.reward for t in trajectories], dtype=np.float64),
        "groups_N": np.array([s.group for s in samples], dtype=np.int64),
        "truncated_N": np.array([t.finish_reason.is_truncated for t in trajectories]),
        "sampled_S": np.flatnonzero(np.concatenate([is_target(t) for t in trajectories])),
    }
    if any(sample.beyond is not None for sample in samples):
        arrays["beyond_T"] = of_tokens([False if s.beyond is None else s.beyond for s in samples], bool)
    if (routes_ULK := rows_of(sequences, shared)) is not None:
        arrays["routes_ULK"] = routes_ULK
    tensors = dict(zip(arrays, copied([*arrays.values()], device), strict=True))
    part = None
    if context is not None:
        part = ContextPart.of(
            arrays["sampled_S"],
            num_tokens=total,
            shared=shared,
            num_ranks=context.size,
            rank=context.rank,
            device=device,
        )
    num_masked_N = None
    if any(sample.num_masked for sample in samples):
        (num_masked_N,) = copied([np.array([sample.num_masked for sample in samples])], device)
    return PackedBatch(
        **tensors,
        lengths=tuple(lengths),
        sample_lengths=tuple(sample_lengths),
        shared=shared,
        num_masked_N=num_masked_N,
        is_continued=samples[-1].is_continued,
        samples=samples,
        context=part,
    )


def in_lockstep(
    microbatches: Iterable[MicroBatch], ranks: Ranks, *, shares_prefixes: bool = True
) -> Iterator[tuple[PackedBatch, bool]]:
    """Yields (batch, live): this rank's micro-batches with live=True, then dummies with live=False.

    `shares_prefixes`: see `collate`.

    In a context group all ranks get the micro-batches of the first one, the others with live=False: their
    forward and backward are needed, but not their losses. Dummies follow for as long as another rank still
    has micro-batches. Collective. Raises IncompleteStepError on every rank if one abandons the step.
    """
    remaining = iter(microbatches)
    while True:
        microbatch = next(remaining, None)
        if not ranks.any_left(microbatch is not None):
            return
        ranks.place.next_microbatch()
        live = microbatch is not None
        if ranks.context is not None:
            assert microbatch is None or ranks.has_samples
            own = (microbatch or ()) if ranks.has_samples else None
            microbatch = spread_microbatch(own, ranks.context) or None
        if microbatch is None:
            yield collate([DUMMY], device=ranks.device), False
        else:
            batch = collate(
                microbatch, device=ranks.device, shares_prefixes=shares_prefixes, context=ranks.context
            )
            yield batch, live


DUMMY = TrainingSample(
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
