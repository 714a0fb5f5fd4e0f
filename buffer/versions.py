"""Weights versions: integers that are never given out twice, and the optimizer step that each stands for."""

from __future__ import annotations

import numpy as np

from areal_like.trajectory import Trajectory
from buffer.store import Store, VersionRow
from buffer.tickets import Sample


class VersionBook:
    """Version -> step. Lag is a difference of steps, never of versions: a push may be repeated, a resumed trainer goes back."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._weights: dict[int, tuple[int, int]] = {0: (0, 0)}
        self.newest = 0
        """The last one given out; 0 is what servers start with, the weights at `model.path`."""

    def begin(self, *, next_version: int) -> None:
        """A run begins or goes on in a new buffer: numbers go on from `next_version`.

        Version 0 stays step 0, what servers load from `model.path`, so a resumed run takes nothing from a server that has not received the
        checkpoint's weights yet (unless the bound allows it). Versions of an earlier life are unknown, and so refused.
        """
        self.newest = max(0, next_version - 1)

    def alloc(self, *, step: int, trainer_incarnation: int) -> int:
        """A new version for weights that are the start of `step`."""
        row = VersionRow(version=self.newest + 1, step=step, parent=self.newest, trainer_incarnation=trainer_incarnation)
        self.newest = row.version
        self._weights[row.version] = (step, trainer_incarnation)
        self._store.put_version(row)
        return row.version

    def step_of(self, version: int) -> int | None:
        """The step that a version is the start of; None: never given out in this life."""
        known = self._weights.get(version)
        return None if known is None else known[0]

    def weights_of(self, version: int) -> tuple[int, int]:
        """(step, trainer incarnation) of a version that was given out: equal for versions that are a push and its repetition."""
        return self._weights[version]

    def summarise(self, lease_id: int, trajectory: Trajectory) -> Sample | None:
        """What the ledger keeps of a trajectory with at least one sampled token; None if a token names an unknown version."""
        oldest, newest = trajectory.oldest_version, trajectory.newest_version
        if oldest == newest:  # most of them, and sorting a thousand versions is what would cost here
            counts = {oldest: trajectory.num_sampled}
        else:
            versions, lengths = np.unique(trajectory.versions[trajectory.versions >= 0], return_counts=True)
            counts = dict(zip(versions.tolist(), lengths.tolist(), strict=True))
        steps = {version: self._weights[version][0] for version in counts if version in self._weights}
        if len(steps) < len(counts):
            return None
        return Sample(
            lease_id=lease_id,
            oldest_step=min(steps.values()),
            sum_token_steps=sum(steps[version] * count for version, count in counts.items()),
            oldest_version=oldest,
            newest_version=newest,
            num_sampled=sum(counts.values()),
            reward=trajectory.reward,
        )
