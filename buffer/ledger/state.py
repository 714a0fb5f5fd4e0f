"""The state of a ledger: its tables, the step scheduler, the step log, and a few scalars, without rules.

`recovery.py` fills a `LedgerState` from the store. `lifecycle.py` and the modules that use it contain the
rules that change the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from areal_like.wire.routes import RoutesShape
from buffer.scheduling.admission import Admission
from buffer.scheduling.staleness import StalenessBound
from buffer.scheduling.step_log import StepLog
from buffer.scheduling.step_scheduler import StepScheduler
from buffer.settings import LedgerSettings
from buffer.storage.base import Store
from buffer.tables.counters import StreamCounters
from buffer.tables.evaluations import EvalTable
from buffer.tables.incarnations import IncarnationTable
from buffer.tables.lease_table import LeaseTable
from buffer.tables.live_settings import MAX_STALENESS, LiveSettings
from buffer.tables.operator_holds import OperatorHolds
from buffer.tables.parts import PartTable
from buffer.tables.prompt_source import PromptSource
from buffer.tables.ticket_table import TicketTable
from buffer.tables.version_table import VersionTable
from buffer.tickets import Drop

_SECRET_PARTS = tuple(f"session_secret:{place}" for place in range(4))
_PART_BITS = 62
"""A scalar is a number of 63 bits."""


class LedgerState:
    """All data of one ledger. Empty when constructed."""

    def __init__(self, settings: LedgerSettings, store: Store, *, first_lease_id: int = 1) -> None:
        """`first_lease_id`, counted within the shard, must exceed all lease ids of the run's earlier buffers.

        Otherwise a late sample of an old lease could be accepted under a new lease with the same id.
        """
        self.settings = settings
        self.store = store
        self.counters = StreamCounters(
            reward_low=settings.buffer.curriculum_reward_low,
            reward_high=settings.buffer.curriculum_reward_high,
        )
        self.incarnations = IncarnationTable(store)
        self.versions = VersionTable(store)
        self.tickets = TicketTable(store, settings.shard)
        self.prompts = PromptSource(settings, store)
        self.evals = EvalTable(store, keep=settings.keep_evaluations)
        self.leases = LeaseTable(
            store,
            lease_timeout_s=settings.buffer.lease_timeout_s,
            first_lease_id=first_lease_id,
            shard=settings.shard,
        )
        self.bound = StalenessBound(
            0 if settings.adaptive else settings.staleness_cap, sync_interval=settings.sync_interval
        )
        self.scheduler = StepScheduler(
            groups_per_step=settings.groups_per_step,
            num_steps=settings.num_steps,
            wait_for_overdue=settings.overdue == "wait",
            ready_expires=not settings.closes,
        )
        self.parts = PartTable()
        self.steps = StepLog(store, self.tickets, self.counters, groups_per_step=settings.groups_per_step)
        self.admission = Admission(
            settings,
            tickets=self.tickets,
            parts=self.parts,
            leases=self.leases,
            steps=self.steps,
            scheduler=self.scheduler,
            bound=self.bound,
        )
        self.holds = OperatorHolds(store)
        self.live = LiveSettings(store)
        self.drops: Counter[Drop] = Counter()
        """Dropped tickets by reason."""
        self.trainer_incarnation = 0
        """Incarnation of the newest trainer; 0: no trainer has started."""
        self.is_finished = False
        """True after the trainer has completed the last step and everything that follows it."""
        self.closed_reason = "no trainer has started yet"
        """Why no train tickets are issued; empty while they are."""
        self.failure_reason = ""
        """Why the job cannot continue (too many failures in a row); empty while it can. Not stored."""
        self.notices: list[str] = []
        """Texts for the log: quarantines of servers, and consecutive groups without spread."""
        self.settings_changed = False
        """True if the steps were recorded under other settings (`recorded_settings`). Then no group is
        recorded until a trainer starts, which restarts the stream at the step of its checkpoint."""
        self.prompts_changed = False
        """True if the data set has changed, so that recorded indices refer to other prompts. The next trainer
        start resets the order of prompts."""
        self.content = 0
        """Fingerprint of the data that prompts come from, as servers reported it; 0: not known."""
        self.recorded_settings: dict[str, int] = {}
        """The settings that recorded steps depend on, as scalars to compare at the next start."""
        self.num_journal_bytes = 0
        """Bytes of the journals of all sessions."""
        self.session_secret = 0
        """Secret of the keys of sessions, the same for all buffers of a run (`session_keys`)."""
        self.routes_shape: RoutesShape | None = None
        """What the routes of samples must be like, as the trainer has said; None: not known."""

    @property
    def configured(self) -> dict[str, str]:
        """The buffer's own settings that `live` records by step."""
        bound = "auto" if self.settings.adaptive else str(self.settings.staleness_cap)
        return {MAX_STALENESS: bound, **self.settings.recorded}

    def put_recorded_settings(self) -> None:
        """Writes the current settings as those of all recorded steps."""
        for name, value in self.recorded_settings.items():
            self.store.put_scalar(name, value)

    def restore_secret(self, scalars: Mapping[str, int], *, new: int) -> None:
        """Takes the secret of an earlier buffer, or `new` (below 2**248) if there was none."""
        self.session_secret = new
        if _SECRET_PARTS[0] in scalars:
            parts = (scalars[name] << (_PART_BITS * place) for place, name in enumerate(_SECRET_PARTS))
            self.session_secret = sum(parts)
            return
        for place, name in enumerate(_SECRET_PARTS):
            self.store.put_scalar(name, new >> (_PART_BITS * place) & ((1 << _PART_BITS) - 1))

    def set_trainer(self, incarnation: int) -> None:
        """Sets the incarnation of the newest trainer; requests of older trainers are refused."""
        self.trainer_incarnation = incarnation
        self.store.put_scalar("trainer_incarnation", incarnation)

    def set_routes_shape(self, shape: RoutesShape | None) -> None:
        """Sets what the routes of samples must be like; a restarted buffer remembers it."""
        if shape != self.routes_shape:
            self.routes_shape = shape
            for name, number in zip(RoutesShape._fields, shape or (0, 0, 0), strict=True):
                self.store.put_scalar(f"routes:{name}", number)

    def set_finished(self, is_finished: bool) -> None:
        """Sets or removes the mark of a finished run; it refers to the current number of steps."""
        self.is_finished = is_finished
        self.store.put_scalar("finished_steps", self.settings.num_steps if is_finished else 0)

    def set_closed(self, reason: str) -> None:
        """Closes admission of train tickets for this reason; an empty reason opens it."""
        self.closed_reason = reason
        self.store.put_scalar("is_open", int(not reason))


class LedgerPart:
    """A part of a ledger's rules, with short names for the tables of its state."""

    def __init__(self, state: LedgerState) -> None:
        self._state = state
        self._settings = state.settings
        self._store = state.store
        self._counters = state.counters
        self._versions = state.versions
        self._tickets = state.tickets
        self._evals = state.evals
        self._leases = state.leases
        self._bound = state.bound
        self._scheduler = state.scheduler
        self._parts = state.parts
        self._steps = state.steps
