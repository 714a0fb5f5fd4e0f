"""A ledger out of what an earlier one wrote: equal to it in everything that the future depends on.

Not recovered, on purpose:
* Evaluations. Their tickets drop as cancelled; the trainer asks again and gets a new round.
* Servers. They have to say hello again; until then those with leases are kept as silent ones, so that a server that went on working
  delivers under the lease it has, and one that is gone loses it after `lease_timeout_s`.
* A run of failed samples, and the reason for which the job had failed: whoever starts the buffer again wants to try again.

A ledger that was open goes on at once: its trainer is there and does not know that anything happened. One that was closed, or whose records
have another shape than the settings now ask for, waits for a trainer to start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from areal_like.errors import ConfigError
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.ledger import Ledger
from buffer.prompts import curriculum as curricula
from buffer.settings import LedgerSettings
from buffer.storage.base import Recovered, Store
from buffer.tickets import State

_SHAPE = ("groups_per_step", "group_size", "num_greedy", "sync_interval", "max_staleness")


def recover(
    settings: LedgerSettings,
    store: Store,
    *,
    now_s: float,
    first_lease_id: int = 1,
    dataset: int = 0,
    ignoring: Collection[int] = (),
) -> Ledger:
    """The ledger that `store` remembers; a new one when it remembers nothing. Call it once, before anything is written.

    `dataset`: a number that says which prompts the indices mean. `ignoring`: tickets whose trajectories may be damaged.
    """
    memory = store.recover(ignoring=ignoring)
    ledger = Ledger(settings, store, first_lease_id=first_lease_id)
    marks = memory.marks
    _check_shard(settings, marks)
    store.put_mark("shard", settings.shard.index)
    store.put_mark("num_shards", settings.shard.count)
    ledger.shape = {f"shape:{name}": int(getattr(settings, name)) for name in _SHAPE} | {
        "shape:dataset": dataset
    }
    ledger.settings_changed = any(marks.get(name, value) != value for name, value in ledger.shape.items())
    ledger.has_other_prompts = marks.get("shape:dataset", dataset) != dataset
    if (
        not ledger.settings_changed
    ):  # else the marks stay those of what is recorded, for whoever starts the buffer before a trainer comes
        ledger.put_shape()
    _restore_books(ledger, memory)
    _restore_stream(ledger, memory, now_s=now_s)
    ledger.trainer_incarnation = marks.get("trainer_incarnation", 0)
    if ledger.settings_changed:
        ledger.close("the settings have changed: the next trainer starts the stream anew")
    elif marks.get("is_open", 0):
        ledger.closed_because = ""
    ledger.settle_recovered()
    return ledger


def _check_shard(settings: LedgerSettings, marks: Mapping[str, int]) -> None:
    shard = settings.shard
    index, count = marks.get("shard", shard.index), marks.get("num_shards", shard.count)
    if (index, count) != (shard.index, shard.count):
        raise ConfigError(
            f"this ledger was written by shard {index} with buffer.num_shards={count}, which stay as they are for a run's life"
        )


def _restore_books(ledger: Ledger, memory: Recovered) -> None:
    """Counts and marks."""
    marks = memory.marks
    ledger.statistics.restore(memory.statistics)
    ledger.register.restore(memory.tickets, memory.ended, last_id=memory.num_issued)
    for (_, _, reason), count in memory.ended.items():
        if reason is not None:
            ledger.drops[reason] += count
    ledger.versions.restore(memory.versions, memory.rollbacks, newest=marks.get("newest_version", 0))
    if ledger.settings.adaptive:
        ledger.bound.max_staleness = min(marks.get("max_staleness", 0), ledger.settings.max_staleness)
    ledger.incarnations = {
        name.removeprefix("incarnation:"): value
        for name, value in marks.items()
        if name.startswith("incarnation:")
    }
    ledger.prompts.resume(cursor=marks.get("cursor", 0), returned=memory.returned)
    _restore_curriculum(ledger, marks)


def _restore_curriculum(ledger: Ledger, marks: Mapping[str, int]) -> None:
    """What was heard of prompts, unless they are others now. Slots are given out anew, so all marks are written again."""
    curriculum = ledger.prompts.curriculum
    heard = curricula.marks_of(marks)
    if curriculum is None or not heard:
        return
    if not ledger.has_other_prompts:
        curriculum.restore(curricula.state_of(heard))
    for name, value in (dict.fromkeys(heard, 0) | curriculum.marks()).items():
        ledger.store.put_mark(name, value)


def _restore_stream(ledger: Ledger, memory: Recovered, *, now_s: float) -> None:
    """Tickets to where their states say they are."""
    ledger.book.restore(memory.leases, ledger.register.live, now_s=now_s)
    batched = [ticket for ticket in memory.tickets if ticket.state is State.BATCHED]
    ledger.steps.restore([*memory.trained, *batched], memory.marks, memory.attempts)
    if ledger.settings_changed:  # its places are not those of the steps that are recorded
        return
    ledger.recorder.restore(
        [(ticket.step, ticket.position) for ticket in batched], first_step=ledger.committed_step + 1
    )
    for ticket in memory.tickets:
        if ticket.purpose is Purpose.TRAIN:
            ledger.readmit(ticket)
