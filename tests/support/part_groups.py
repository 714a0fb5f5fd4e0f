"""Messages of whole groups and of parts of closed groups, as with `buffer.overdue=close`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import ClosedGroup, EarlyMember, Group
from areal_like.wire.records import Record
from tests.support.trainer_helpers import random_groups

FIRST_VERSION = 40
"""Version of the weights of step 0; that of step k is 2 k later, as after repeated pushes."""


def version_of(step: int) -> int:
    """The version of the weights of a step."""
    return FIRST_VERSION + 2 * step


def sampled_at(trajectory: Trajectory, steps: Sequence[int]) -> Trajectory:
    """The trajectory with its sampled tokens from the weights of these steps, the last one repeated."""
    num = trajectory.num_sampled
    all_steps = [*steps[:num], *[steps[-1]] * (num - len(steps))]
    versions = np.full(trajectory.num_tokens, -1, dtype=np.int32)
    versions[trajectory.loss_mask == 1] = [version_of(step) for step in all_steps]
    return replace(trajectory, versions=versions)


def member(index: int, trajectory: Trajectory) -> EarlyMember:
    """The trajectory as an early member."""
    return EarlyMember(
        sample_index=index,
        reward=trajectory.reward,
        num_sampled=trajectory.num_sampled,
        is_truncated=trajectory.finish_reason.is_truncated,
    )


def served(
    records: Sequence[Record],
    *,
    step: int,
    position: int = 0,
    max_staleness: int = 2,
    begin_step: int = -1,
    closed: Sequence[ClosedGroup] = (),
) -> Group:
    """The message with these records. `begin_step`: of a whole group."""
    trajectories = [record.trajectory() for record in records]
    versions = sorted({int(v) for t in trajectories for v in t.versions if v >= 0})
    return Group(
        step=step,
        position=position,
        ticket_id=1000 + position if closed else records[0].ticket_id,
        prompt_index=-1 if closed else 7,
        records=list(records),
        version_steps=[(t.oldest_version - FIRST_VERSION) // 2 for t in trajectories],
        max_staleness=max_staleness,
        versions=versions,
        steps=[(version - FIRST_VERSION) // 2 for version in versions],
        begin_step=begin_step,
        closed=list(closed),
    )


def example_step(step: int, *, group_size: int = 3, seed: int = 0, max_staleness: int = 2) -> list[Group]:
    """Four positions of `step` (at least 4): two whole groups and two of parts, early and late.

    Of the samples some are wholly beyond the bound, and some begin beyond it.
    """
    groups = random_groups(6, group_size=group_size, seed=seed + 100 * step)
    ages = ([step], [step - 1], [step - 4, step - 3, step - 1], [step - 3, step], [step - 2], [step - 3])
    dated = [
        [sampled_at(t, ages[(g + i) % len(ages)]) for i, t in enumerate(group)]
        for g, group in enumerate(groups)
    ]
    records = [[Record.of(10 * step + g, i, t) for i, t in enumerate(group)] for g, group in enumerate(dated)]
    whole = [
        served(records[g], step=step, position=g, begin_step=step - 1, max_staleness=max_staleness)
        for g in range(2)
    ]
    num_early = [1, 2, 0, group_size]
    closed = [
        ClosedGroup(
            ticket_id=10 * step + g,
            prompt_index=g,
            begin_step=step - 3,
            early=[member(i, t) for i, t in enumerate(dated[g])][: num_early[g - 2]],
        )
        for g in range(2, 6)
    ]
    parts = [
        served(
            [*records[g][:2], *records[g + 1][2:]],
            step=step,
            position=g // 2 + 1,
            closed=closed[g - 2 : g],
            max_staleness=max_staleness,
        )
        for g in (2, 4)
    ]
    return [*whole, *parts]
