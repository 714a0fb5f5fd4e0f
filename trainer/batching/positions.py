"""The samples of one position of a step, with the age of each token and the group that each sample is from.

A position has a whole group, or (`buffer.overdue=close`) parts of groups that were closed before all of their
samples were complete. The ages come from the `Group` message: with `versions` and `steps` they are exact.
Without them (`max_staleness` -1: groups of an earlier release) only the step of a sample's oldest version is
known, and each later version is assumed to be one step newer, which is wrong only if the trainer was
restarted or a push failed between the two.

Shape suffix: T tokens of a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from areal_like.trajectory import NOT_SAMPLED, Trajectory
from areal_like.wire.messages.consumer import EarlyMember, Group
from areal_like.wire.records import sampled_versions
from areal_like.wire.routes import RoutesShape
from trainer.batching.routes import RouteFault, fault_of

Lags = NDArray[np.int64]
"""Lag of each token of a trajectory, [num_tokens], in optimizer steps; 0 where not sampled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The group that one sample belongs to, for the sample's baseline."""

    ticket_id: int
    sample_index: int
    begin_step: int
    """Step of the weights at the group's begin; -1: unknown, before all others."""
    early: Sequence[EarlyMember]
    """The members that were complete when the group was closed; of a whole group: all."""
    is_closed: bool
    """False: a whole group."""

    @property
    def is_late(self) -> bool:
        """The sample was completed after its group was closed."""
        return all(member.sample_index != self.sample_index for member in self.early)


@dataclass(frozen=True, kw_only=True, eq=False)
class Position:
    """The samples of one position of a step."""

    trajectories: Sequence[Trajectory]
    """A greedy sample is the last."""
    lags: Sequence[Lags]
    """[T] of each trajectory."""
    max_staleness: int = -1
    """Tokens of a larger lag are beyond the bound; -1: the bound is that of samples, not of tokens."""
    origins: Sequence[Origin] | None = None
    """The group of each trajectory; None: all of them are one group, without `buffer.overdue=close`."""
    place: int = 0
    """Its number in the step, counted over all ranks."""
    left_out: frozenset[int] = frozenset()
    """Indices of the trajectories that are not trained on, because their routes cannot be used."""

    @classmethod
    def of(cls, group: Group) -> Position:
        trajectories = group.trajectories
        if group.max_staleness < 0:
            lags = [
                _guessed_lags(trajectory, oldest_lag=group.step - version_step)
                for trajectory, version_step in zip(trajectories, group.version_steps, strict=True)
            ]
        else:
            lags = _exact_lags(group)
        position = cls(trajectories=trajectories, lags=lags, max_staleness=group.max_staleness)
        if group.closed:
            return replace(position, origins=_origins_of_parts(group))
        if group.begin_step >= 0:
            indices = [record.sample_index for record in group.records]
            return position.as_whole_group(group.ticket_id, begin_step=group.begin_step, indices=indices)
        return position

    @classmethod
    def plain(cls, trajectories: Sequence[Trajectory], *, step: int) -> Position:
        """A group of which no steps are known: a version is the number of steps before it."""
        lags = [np.maximum(step - t.versions.astype(np.int64), 0) for t in trajectories]
        return cls(trajectories=trajectories, lags=lags)

    def as_whole_group(
        self, ticket_id: int = 0, *, begin_step: int = -1, indices: Sequence[int] | None = None
    ) -> Position:
        """The same samples as one whole group. `indices`: their sample indices, by default 0, 1, ..."""
        used = range(len(self.trajectories)) if indices is None else indices
        members = [
            EarlyMember(
                sample_index=index,
                reward=trajectory.reward,
                num_sampled=trajectory.num_sampled,
                is_truncated=trajectory.finish_reason.is_truncated,
            )
            for index, trajectory in zip(used, self.trajectories, strict=True)
        ]
        origins = [
            Origin(
                ticket_id=ticket_id,
                sample_index=index,
                begin_step=begin_step,
                early=members,
                is_closed=False,
            )
            for index in used
        ]
        return replace(self, origins=origins)

    @property
    def is_of_parts(self) -> bool:
        """True if the samples are parts of closed groups."""
        return any(origin.is_closed for origin in self.origins or ())

    @cached_property
    def _has_beyond(self) -> bool:
        """True if a token is beyond the bound."""
        return bool(0 <= self.max_staleness < np.concatenate(self.lags).max())

    def routed(
        self, shape: RoutesShape | None, *, whole_groups: bool = False
    ) -> tuple[Position, dict[int, RouteFault]]:
        """(this position with only the routes that a model of this shape replays, faults by trajectory).

        Trajectories with a fault are left out, and with `whole_groups` all others too. Greedy ones are not
        trained on and need no routes. `shape` None: no routes are replayed.
        """
        trained: set[int] = set()
        faults: dict[int, RouteFault] = {}
        if shape is not None:
            trained = {index for index, each in enumerate(self.trajectories) if not each.is_greedy}
            found = {index: fault_of(self.trajectories[index], shape) for index in trained}
            faults = {index: fault for index, fault in found.items() if fault is not None}
        left_out = frozenset(trained if faults and whole_groups else faults)
        trajectories = [
            each if each.routes is None or index in trained - left_out else replace(each, routes=None)
            for index, each in enumerate(self.trajectories)
        ]
        return replace(self, trajectories=trajectories, left_out=left_out), faults

    def masked(self, index: int, *, masks_beyond: bool) -> NDArray[np.bool_] | None:
        """bool [T] of a trajectory: sampled tokens that are context only; None if there are none.

        `masks_beyond`: those beyond the bound are.
        """
        if index in self.left_out:
            return self.trajectories[index].loss_mask.astype(bool)
        return self.beyond(index) if masks_beyond else None

    def beyond(self, index: int) -> NDArray[np.bool_] | None:
        """bool [T] of a trajectory: sampled tokens beyond the bound; None if there are none."""
        if not self._has_beyond:
            return None
        beyond_T = (self.lags[index] > self.max_staleness) & (self.trajectories[index].loss_mask == 1)
        return beyond_T if beyond_T.any() else None


def as_context(trajectory: Trajectory, masked_T: NDArray[np.bool_]) -> Trajectory:
    """The trajectory with these tokens as context only, like a prompt, for a training sample.

    Its turns and steps are left out, because each ends with a sampled token.
    """
    return replace(
        trajectory,
        loss_mask=np.where(masked_T, 0, trajectory.loss_mask).astype(np.uint8),
        logprobs=np.where(masked_T, 0, trajectory.logprobs).astype(np.float32),
        versions=np.where(masked_T, NOT_SAMPLED, trajectory.versions).astype(np.int32),
        turns=(),
        arrays=trajectory.arrays_without_steps,
    )


def _guessed_lags(trajectory: Trajectory, *, oldest_lag: int) -> Lags:
    oldest = trajectory.oldest_version
    lag_T = np.subtract(oldest_lag + oldest, trajectory.versions, dtype=np.int64)
    np.maximum(lag_T, 0, out=lag_T)
    lag_T *= trajectory.loss_mask
    return lag_T


def _exact_lags(group: Group) -> list[Lags]:
    lag_of = {
        version: max(group.step - step, 0) for version, step in zip(group.versions, group.steps, strict=True)
    }
    assert lag_of.keys() >= {*sampled_versions(group.records)}, (
        f"ticket {group.ticket_id}: a token has a version whose step the buffer has not sent"
    )
    lag_of[NOT_SAMPLED] = 0
    return [
        np.repeat([lag_of[version] for version, _ in record.runs], [length for _, length in record.runs])
        for record in group.records
    ]


def _origins_of_parts(group: Group) -> list[Origin]:
    closed = {each.ticket_id: each for each in group.closed}
    return [
        Origin(
            ticket_id=record.ticket_id,
            sample_index=record.sample_index,
            begin_step=closed[record.ticket_id].begin_step,
            early=closed[record.ticket_id].early,
            is_closed=True,
        )
        for record in group.records
    ]
