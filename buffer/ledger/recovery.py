"""Rebuilds a ledger from the rows of an earlier buffer, so that it behaves the same in every later operation.

A running evaluation continues with its missing samples, and the trainer's repeated request waits for it,
unless its set is now configured differently or the settings of the steps have changed.

Not recovered, on purpose:
* Registrations of servers. Servers have to register again. Until then a server with leases is kept as one
  that does not respond: if it continued to work, it can deliver samples under its leases; if it is gone, its
  leases expire after `lease_timeout_s`.
* The limit of work in progress with `buffer.overdue=close`, which follows the trainer within a few steps.
* Failures in a row, quarantines of servers, and the reason of a failed job: a restart of the buffer is a
  retry.

Lease ids grow over restarts, so that a late sample of an earlier buffer's lease is not accepted under a new
lease with the same id: each buffer has its own range, given by the number of generations in the ledger.

A ledger that was open is open again at once, because its trainer may still be running and need not do
anything. A ledger that was closed, or whose steps were recorded under other settings, waits for a trainer to
start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from areal_like.errors import ConfigError
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.routes import RoutesShape
from buffer.ledger.lease_dispatcher import CONTENT
from buffer.ledger.ledger import Ledger
from buffer.ledger.session_journals import num_bytes_of
from buffer.ledger.state import LedgerState
from buffer.settings import GROUPS_PER_STEP, LedgerSettings
from buffer.storage.base import Recovered, Store
from buffer.tables.evaluations import DONE, tickets_of
from buffer.tables.live_settings import MAX_STALENESS
from buffer.tickets import State

_GENERATION_BITS = 36
"""A buffer has 2**36 lease ids, more than it can grant; ids of all generations and shards have 63 bits."""
_GENERATIONS_BY_CLOCK = 1 << 16
"""Ids of the previous release were below 2**52."""


def recover(
    settings: LedgerSettings,
    store: Store,
    *,
    now_s: float,
    dataset: int = 0,
    ignoring: Collection[int] = (),
    generation: int = 0,
    reopen: bool = False,
    new_secret: int = 0,
) -> Ledger:
    """The ledger that `store` contains; a new one if it is empty. Call it once, before the first write.

    `dataset`: a number that identifies the data set to which prompt indices refer. `ignoring`: tickets whose
    trajectories may be damaged. `generation`: number of earlier buffers, if the store does not know it;
    choose it at random for a store that is not durable. `reopen`: continues a finished run. `new_secret`:
    of the keys of sessions, for a new ledger. Raises ConfigError if another shard wrote the store,
    StoreCorruptError for damaged trajectories.
    """
    recovered = store.recover(ignoring=ignoring)
    generation = _next_generation(recovered, generation)
    state = LedgerState(settings, store, first_lease_id=generation << _GENERATION_BITS)
    store.put_scalar("generation", generation)
    _check_shard(settings, recovered.scalars)
    store.put_scalar("shard", settings.shard.index)
    store.put_scalar("num_shards", settings.shard.count)
    if not recovered.num_issued:
        # A ledger of an earlier release has samples that the counters of lengths leave out; the audit asks.
        store.put_scalar("counts_selection", 1)
    _compare_settings(state, recovered.scalars, dataset=dataset)
    _restore_tables(state, recovered)
    _restore_steps(state, recovered, now_s=now_s)
    _restore_settings(state, recovered)
    _restore_evals(state, recovered)
    state.restore_secret(recovered.scalars, new=new_secret)
    state.num_journal_bytes = num_bytes_of(state.tickets.live.values())
    state.trainer_incarnation = recovered.scalars.get("trainer_incarnation", 0)
    if all(shape := [recovered.scalars.get(f"routes:{name}", 0) for name in RoutesShape._fields]):
        state.routes_shape = RoutesShape(*shape)
    state.is_finished = recovered.scalars.get("finished_steps", 0) >= settings.num_steps and not reopen
    ledger = Ledger(state)
    if state.settings_changed:
        ledger.trainer.close(
            "the settings have changed: the next trainer restarts the stream at its checkpoint"
        )
    else:
        # Only under the same settings: otherwise the positions of recorded steps do not fit the scheduler.
        for ticket in recovered.tickets:
            if ticket.purpose is Purpose.TRAIN:
                ledger.lifecycle.readmit(ticket)
        if recovered.scalars.get("is_open", 0):
            state.closed_reason = ""
    ledger.lifecycle.cancel_unusable_evals()
    ledger.lifecycle.record_ready_groups()
    return ledger


def _next_generation(recovered: Recovered, before: int) -> int:
    """The number of this buffer among all buffers that have used the store."""
    if "generation" not in recovered.scalars and recovered.num_issued:
        before = _GENERATIONS_BY_CLOCK  # the previous release derived lease ids from the time
    return recovered.scalars.get("generation", before) + 1


def _check_shard(settings: LedgerSettings, scalars: Mapping[str, int]) -> None:
    shard = settings.shard
    index, count = scalars.get("shard", shard.index), scalars.get("num_shards", shard.count)
    if (index, count) != (shard.index, shard.count):
        raise ConfigError(
            f"this ledger was written by shard {index} with buffer.num_shards={count}, "
            "and the number of shards cannot change during a run"
        )


def _compare_settings(state: LedgerState, scalars: Mapping[str, int], *, dataset: int) -> None:
    settings = state.settings
    # A change of any of these restarts the stream. The names are those on disk.
    state.recorded_settings = {
        "shape:groups_per_step": settings.groups_per_step,
        "shape:group_size": settings.group_size,
        "shape:num_greedy": settings.num_greedy,
        "shape:sync_interval": settings.sync_interval,
        "shape:max_staleness": settings.staleness_cap,
        "shape:dataset": dataset,
    }
    state.settings_changed = any(
        scalars.get(name, value) != value for name, value in state.recorded_settings.items()
    )
    state.prompts_changed = scalars.get("shape:dataset", dataset) != dataset
    if not state.prompts_changed:  # other prompts mean other content, which needs no further treatment
        state.content = scalars.get(CONTENT, 0)
    # If they changed, the scalars on disk stay unchanged until a trainer has restarted the stream: the buffer
    # may be restarted before that, and must detect the change again.
    if not state.settings_changed:
        state.put_recorded_settings()


def _restore_tables(state: LedgerState, recovered: Recovered) -> None:
    scalars = recovered.scalars
    state.counters.restore(recovered.counters)
    state.tickets.restore(recovered.tickets, recovered.ended, last_id=recovered.num_issued)
    for (_, _, reason), count in recovered.ended.items():
        if reason is not None:
            state.drops[reason] += count
    state.versions.restore(recovered.versions, recovered.rollbacks, newest=scalars.get("newest_version", 0))
    if state.settings.adaptive:
        state.bound.current = min(scalars.get("max_staleness", 0), state.settings.staleness_cap)
    state.incarnations.restore(scalars)
    state.holds.restore(scalars)
    state.prompts.restore(scalars, recovered.returned, are_other_prompts=state.prompts_changed)


def _restore_steps(state: LedgerState, recovered: Recovered, *, now_s: float) -> None:
    state.leases.restore(recovered.leases, state.tickets.live, now_s=now_s)
    batched = [ticket for ticket in recovered.tickets if ticket.state is State.BATCHED]
    closed = [ticket for ticket in recovered.tickets if ticket.state is State.CLOSED]
    state.parts.restore([*closed, *recovered.split], positions=[*recovered.trained, *batched])
    state.steps.restore([*recovered.trained, *batched], recovered.scalars, recovered.attempts)
    if not state.settings_changed:
        taken = [(ticket.step, ticket.position) for ticket in batched]
        state.scheduler.restore(taken, first_step=state.steps.committed + 1)


def _restore_settings(state: LedgerState, recovered: Recovered) -> None:
    """An operator's staleness bound applies until the setting itself is changed."""
    state.live.restore(recovered.settings)
    configured = {MAX_STALENESS: state.configured[MAX_STALENESS]}
    if state.live.configured(MAX_STALENESS) is None:  # a new ledger, or one of the previous release
        state.live.begin(state.steps.current, configured, unix_s=0.0)
    if state.live.configured(GROUPS_PER_STEP) is None:  # of the steps that the previous release has recorded
        state.live.begin(0, _groups_per_step(state, recovered.scalars), unix_s=0.0)
    row = state.live.newest(MAX_STALENESS)
    is_as_before = state.live.configured(MAX_STALENESS) == configured[MAX_STALENESS]
    if row is not None and is_as_before and not state.settings.adaptive:
        state.bound.current = int(row.value)


def _groups_per_step(state: LedgerState, scalars: Mapping[str, int]) -> dict[str, str]:
    """`trainer.groups_per_step` of the steps that are recorded; empty if it is not known."""
    settings, share = state.settings, scalars.get("shape:groups_per_step")
    if share is None or GROUPS_PER_STEP not in settings.recorded:
        return {}
    if share == settings.groups_per_step:
        return {GROUPS_PER_STEP: settings.recorded[GROUPS_PER_STEP]}
    return {GROUPS_PER_STEP: str(share)} if settings.shard.count == 1 else {}


def _restore_evals(state: LedgerState, recovered: Recovered) -> None:
    """Finished rounds whose samples are kept, and running ones.

    Those that cannot continue are cancelled in `recover`, when their tickets' leases can be revoked.
    """
    tickets = {ticket.ticket_id: ticket for ticket in recovered.evaluated} | state.tickets.live
    for row in recovered.evaluations:
        of_round = tickets_of(row, tickets, num_shards=state.settings.shard.count)
        if row.state == DONE:
            state.evals.restore_finished(row, of_round)
        else:
            state.evals.begin(row, of_round)
