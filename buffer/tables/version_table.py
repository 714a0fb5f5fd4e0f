"""Weight versions: integers that are never reused, and the optimizer step of each version's weights.

When a trainer resumes at step S, versions of later steps that earlier trainers pushed are *abandoned*: their
weights do not occur in the training that continues from S. A sample from abandoned weights has no defined
lag, because lag is a difference of steps of one training history. So it is not trained on, unless its group
was recorded before. The version of step S itself stays valid, because its weights are those of the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from areal_like.trajectory import NOT_SAMPLED
from areal_like.wire.records import Record
from buffer.storage.base import RollbackRow, Store, VersionRow
from buffer.tables.incarnations import is_impossible
from buffer.tickets import SampleSummary, Verdict

MAX_VERSION = 1 << 53
"""Largest version that a trainer may state. Versions are counted up from it, and must fit into the ledger."""


class VersionTable:
    """Maps versions to steps.

    Lag is a difference of steps, never of versions: a push may be retried, and a resumed trainer may return
    to an earlier step.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._weights: dict[int, tuple[int, int]] = {0: (0, 0)}
        """Version -> (step, trainer incarnation)."""
        self._abandoned: set[int] = set()
        self.newest = 0
        """The last allocated version. Version 0 is the initial one: the weights at `model.path`."""

    def continue_from(self, next_version: int) -> None:
        """Makes `next_version` the next version to allocate, if that exceeds all versions allocated here.

        Version 0 always belongs to step 0, because servers load it from `model.path`. So a resumed run
        accepts no samples from a server that has not received the checkpoint's weights yet (unless the
        staleness bound allows it). If an earlier buffer's ledger was lost, its versions are unknown, and
        samples with them are refused.
        """
        self.newest = max(self.newest, next_version - 1)
        self._store.put_scalar("newest_version", self.newest)

    def restore(self, rows: Iterable[VersionRow], rollbacks: Iterable[RollbackRow], *, newest: int) -> None:
        """Continues from the rows of earlier buffers. `newest`: the scalar that `continue_from` wrote."""
        for row in rows:
            self._weights[row.version] = (row.step, row.trainer_incarnation)
        for rollback in rollbacks:
            self.abandon(after_step=rollback.to_step, trainer_incarnation=rollback.trainer_incarnation)
        self.newest = max(newest, *self._weights)

    def allocate(self, *, step: int, trainer_incarnation: int) -> int:
        """Allocates a new version for the weights that `step` starts from."""
        version = self.newest + 1
        self._put(version, step=step, trainer_incarnation=trainer_incarnation)
        return version

    def adopt(self, version: int, *, step: int, trainer_incarnation: int) -> bool:
        """Adds a version that another shard allocated. Idempotent.

        Returns False if the version is neither newer than all known ones nor known with this step and
        trainer, or above MAX_VERSION.
        """
        if version <= self.newest:
            return self._weights.get(version) == (step, trainer_incarnation)
        if version > MAX_VERSION:
            return False
        self._put(version, step=step, trainer_incarnation=trainer_incarnation)
        return True

    def abandon(self, *, after_step: int, trainer_incarnation: int) -> bool:
        """Abandons earlier trainers' versions of later steps, because a trainer resumed at `after_step`.

        Returns True if there were any that had not been abandoned before.
        """
        left = {
            version
            for version, (step, incarnation) in self._weights.items()
            if step > after_step and incarnation < trainer_incarnation
        }
        has_new = not left <= self._abandoned
        self._abandoned |= left
        return has_new

    def may_use_abandoned(self, sample: SampleSummary) -> bool:
        """True if some of a sample's tokens may come from abandoned weights.

        A summary contains only the oldest and the newest version, so all versions between them count.
        """
        return any(sample.oldest_version <= version <= sample.newest_version for version in self._abandoned)

    def step_of(self, version: int) -> int | None:
        """The step that starts from a version's weights; None if it was abandoned or never allocated."""
        known = self._weights.get(version)
        return None if known is None or version in self._abandoned else known[0]

    @property
    def newest_incarnation(self) -> int:
        """The newest trainer incarnation that has allocated a version; 0 if none has."""
        incarnations = (incarnation for _, incarnation in self._weights.values())
        return max((number for number in incarnations if not is_impossible(number)), default=0)

    def weights_of(self, version: int) -> tuple[int, int]:
        """(step, trainer incarnation) of an allocated version; a push and its retry have the same pair."""
        return self._weights[version]

    def summarize(self, lease_id: int, record: Record, *, failure: str = "") -> SampleSummary | Verdict:
        """The summary of a record with at least one sampled token, or the verdict that refuses it."""
        counts: dict[int, int] = {}
        for version, length in record.runs:
            if version != NOT_SAMPLED:
                counts[version] = counts.get(version, 0) + length
        by_step: dict[int, int] = {}
        for version, count in counts.items():
            if (weights := self._weights.get(version)) is None:
                return Verdict.UNKNOWN_VERSION
            by_step[weights[0]] = by_step.get(weights[0], 0) + count
        if not self._abandoned.isdisjoint(counts):
            return Verdict.ABANDONED
        return SampleSummary(
            lease_id=lease_id,
            oldest_step=min(by_step),
            sum_token_steps=sum([step * count for step, count in by_step.items()]),
            token_steps=tuple(sorted(by_step.items())) if len(by_step) > 1 else (),
            oldest_version=min(counts),
            newest_version=max(counts),
            num_sampled=sum(counts.values()),
            reward=record.reward,
            is_truncated=record.finish_reason.is_truncated,
            failure=failure,
        )

    def _put(self, version: int, *, step: int, trainer_incarnation: int) -> None:
        parent, self.newest = self.newest, version
        self._weights[version] = (step, trainer_incarnation)
        self._store.put_row(
            VersionRow(version=version, step=step, parent=parent, trainer_incarnation=trainer_incarnation)
        )
