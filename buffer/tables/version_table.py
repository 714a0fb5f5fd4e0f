"""Weight versions: integers that are never reused, and the optimizer step that each one stands for.

A trainer that resumes at step S leaves behind the versions of later steps that its predecessors pushed:
weights that are not part of the history that continues. They are *abandoned*. A sample made with one has no
lag, because lag is a difference of steps on one history; so it is not trained on, unless its group was
recorded before. The version of step S itself stays valid: its weights are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable

from areal_like.trajectory import NOT_SAMPLED
from areal_like.wire.records import Record
from buffer.storage.base import Store
from buffer.storage.rows import RollbackRow, VersionRow
from buffer.tickets import SampleSummary, Verdict


class VersionTable:
    """Version -> step.

    Lag is a difference of steps, never of versions: a push may be repeated, and a resumed trainer goes back.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._weights: dict[int, tuple[int, int]] = {0: (0, 0)}
        """Version -> (step, trainer incarnation)."""
        self._abandoned: set[int] = set()
        self.newest = 0
        """The last allocated version; 0 is what servers start with, the weights at `model.path`."""

    def continue_from(self, next_version: int) -> None:
        """Allocates versions from `next_version` on, if that is above those allocated here.

        Version 0 stays step 0, what servers load from `model.path`: so a resumed run takes nothing from a
        server that has not received the checkpoint's weights yet (unless the bound allows it). Versions of an
        earlier buffer without its ledger are unknown, and so refused.
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
        """A new version for weights that are the start of `step`."""
        version = self.newest + 1
        self._put(version, step=step, trainer_incarnation=trainer_incarnation)
        return version

    def adopt(self, version: int, *, step: int, trainer_incarnation: int) -> bool:
        """Adds a version that another shard allocated.

        Idempotent. False if it is not newer than all known ones.
        """
        if version <= self.newest:
            return self._weights.get(version) == (step, trainer_incarnation)
        self._put(version, step=step, trainer_incarnation=trainer_incarnation)
        return True

    def abandon(self, *, after_step: int, trainer_incarnation: int) -> bool:
        """A trainer resumed at `after_step`: abandons later weights of its predecessors.

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
        """True if a sample may have tokens of abandoned weights.

        Versions between its oldest and its newest are not kept, so all of them count.
        """
        return any(sample.oldest_version <= version <= sample.newest_version for version in self._abandoned)

    def step_of(self, version: int) -> int | None:
        """The step that a version is the start of; None: never allocated in this history."""
        known = self._weights.get(version)
        return None if known is None or version in self._abandoned else known[0]

    def weights_of(self, version: int) -> tuple[int, int]:
        """(step, trainer incarnation) of an allocated version: equal for a push and its repetition."""
        return self._weights[version]

    def summarise(self, lease_id: int, record: Record) -> SampleSummary | Verdict:
        """The summary of a record with a sampled token, or the verdict for which it is refused."""
        counts: dict[int, int] = {}
        for version, length in record.runs:
            if version != NOT_SAMPLED:
                counts[version] = counts.get(version, 0) + length
        steps = {version: self._weights[version][0] for version in counts if version in self._weights}
        if len(steps) < len(counts):
            return Verdict.UNKNOWN_VERSION
        if not self._abandoned.isdisjoint(counts):
            return Verdict.ABANDONED
        return SampleSummary(
            lease_id=lease_id,
            oldest_step=min(steps.values()),
            sum_token_steps=sum(steps[version] * count for version, count in counts.items()),
            oldest_version=min(counts),
            newest_version=max(counts),
            num_sampled=sum(counts.values()),
            reward=record.reward,
        )

    def _put(self, version: int, *, step: int, trainer_incarnation: int) -> None:
        parent, self.newest = self.newest, version
        self._weights[version] = (step, trainer_incarnation)
        self._store.put_version(
            VersionRow(version=version, step=step, parent=parent, trainer_incarnation=trainer_incarnation)
        )
