"""Weights versions: integers that are never given out twice, and the optimizer step that each stands for.

A trainer that comes back at step S leaves behind the versions of later steps that its predecessors pushed: weights that never existed in
the history that goes on. They are *abandoned*. Whatever was sampled with one has no lag, which is a difference of steps on one history, so
nothing of it is trained on unless it was recorded before. The version of step S itself stays good: its weights are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable

from areal_like.trajectory import NOT_SAMPLED
from areal_like.wire.records import Record
from buffer.storage.base import RollbackRow, Store, VersionRow
from buffer.tickets import Sample, Verdict


class VersionBook:
    """Version -> step. Lag is a difference of steps, never of versions: a push may be repeated, a resumed trainer goes back."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._weights: dict[int, tuple[int, int]] = {0: (0, 0)}
        self._abandoned: set[int] = set()
        self.newest = 0
        """The last one given out; 0 is what servers start with, the weights at `model.path`."""

    def begin(self, *, next_version: int) -> None:
        """A run begins or goes on in a new buffer: numbers go on from `next_version`.

        Version 0 stays step 0, what servers load from `model.path`, so a resumed run takes nothing from a server that has not received the
        checkpoint's weights yet (unless the bound allows it). Versions of an earlier life are unknown, and so refused.
        """
        self.newest = max(self.newest, next_version - 1)
        self._store.put_mark("newest_version", self.newest)

    def restore(self, rows: Iterable[VersionRow], rollbacks: Iterable[RollbackRow], *, newest: int) -> None:
        """What earlier lives gave out and abandoned. `newest`: as `begin` noted it."""
        for row in rows:
            self._weights[row.version] = (row.step, row.trainer_incarnation)
        for rollback in rollbacks:
            self.abandon(after_step=rollback.to_step, trainer_incarnation=rollback.trainer_incarnation)
        self.newest = max(newest, *self._weights)

    def alloc(self, *, step: int, trainer_incarnation: int) -> int:
        """A new version for weights that are the start of `step`."""
        row = VersionRow(
            version=self.newest + 1, step=step, parent=self.newest, trainer_incarnation=trainer_incarnation
        )
        self._put(row)
        return row.version

    def adopt(self, version: int, *, step: int, trainer_incarnation: int) -> bool:
        """A version that another shard gave out; again is as good as once. False where it is not newer than all that are known."""
        if version <= self.newest:
            return self._weights.get(version) == (step, trainer_incarnation)
        self._put(
            VersionRow(
                version=version, step=step, parent=self.newest, trainer_incarnation=trainer_incarnation
            )
        )
        return True

    def abandon(self, *, after_step: int, trainer_incarnation: int) -> bool:
        """The trainer of this incarnation went back to `after_step`: later weights of its predecessors are of another history.

        Returns whether there were any.
        """
        left = {
            v
            for v, (step, incarnation) in self._weights.items()
            if step > after_step and incarnation < trainer_incarnation
        }
        has_new = not left <= self._abandoned
        self._abandoned |= left
        return has_new

    def has_abandoned(self, sample: Sample) -> bool:
        """Whether a sample may have tokens of abandoned weights: the versions between its oldest and its newest are not kept."""
        return any(sample.oldest_version <= version <= sample.newest_version for version in self._abandoned)

    def step_of(self, version: int) -> int | None:
        """The step that a version is the start of; None: never given out in this history."""
        known = self._weights.get(version)
        return None if known is None or version in self._abandoned else known[0]

    def weights_of(self, version: int) -> tuple[int, int]:
        """(step, trainer incarnation) of a version that was given out: equal for versions that are a push and its repetition."""
        return self._weights[version]

    def summarise(self, lease_id: int, record: Record) -> Sample | Verdict:
        """What the ledger keeps of a record with at least one sampled token; a verdict if its versions forbid to keep any."""
        counts: dict[int, int] = {}
        for version, length in record.runs:
            if version != NOT_SAMPLED:
                counts[version] = counts.get(version, 0) + length
        steps = {version: self._weights[version][0] for version in counts if version in self._weights}
        if len(steps) < len(counts):
            return Verdict.UNKNOWN_VERSION
        if not self._abandoned.isdisjoint(counts):
            return Verdict.ABANDONED
        return Sample(
            lease_id=lease_id,
            oldest_step=min(steps.values()),
            sum_token_steps=sum(steps[version] * count for version, count in counts.items()),
            oldest_version=min(counts),
            newest_version=max(counts),
            num_sampled=sum(counts.values()),
            reward=record.reward,
        )

    def _put(self, row: VersionRow) -> None:
        self.newest = row.version
        self._weights[row.version] = (row.step, row.trainer_incarnation)
        self._store.put_version(row)
