"""Rank 0's end of the weight plane: which servers take part in a push, in which groups and waves, and what became of it.

    eligible servers -> (who is alive?) -> cohorts -> an epoch each, kept while its members stay -> push -> outcome

`weights.topology` says what a cohort is: everybody (`shared`: one broadcast feeds all, and one that breaks it costs all this push), or
each engine by itself (`per_engine`: rank 0 sends everything once an engine, and nobody notices a neighbour's failure).
`weights.max_unavailable` bounds how many servers are being updated at a time: shared cohorts are then cut to that size and go
one after the other, so that capacity never reaches zero where an engine has to pause.

A server that fails, or is silent past its deadline, is left out for a while (`members.py`). In a shared group nobody can say who broke
a broadcast if all survive it, so whoever was in `_PROBE_AFTER` broken ones in a row gets a group of its own: the culprit fails there alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.weights.buckets import Manifest
from areal_like.weights.collective import WeightGroup, device_facts
from areal_like.wire.channel import Link
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.weights import Alive, AskAlive, PushWeights, WeightsFailed, WeightsOk
from trainer.weight_sync.group_session import ALIVE_S, SessionOutcome, WeightGroupSession, rank_ranges
from trainer.weight_sync.receivers import Answer, Key, Member, ReceiverBackoff, key_of
from trainer.weight_sync.snapshot import Snapshot

log = logging.getLogger(__name__)

_FORM_S = 15.0
"""Longest rendezvous of members that have just said that they are alive."""

_PROBE_AFTER = 2
"""Broken pushes in a row that a server survives before it gets a group of its own."""


@dataclass(kw_only=True)
class PushOutcome:
    """Who has the new version active, and why others have not."""

    activated: dict[str, WeightsOk] = field(default_factory=dict)
    """Server name -> its answer."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server name (or `broadcast`) -> reason."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Name of each server that survived a broken broadcast -> seconds until it had left it."""


def split_groups(
    keys: Sequence[Key], *, topology: str, max_unavailable: int, alone: Iterable[Key] = ()
) -> list[list[Key]]:
    """Who shares a group. `alone`: servers that get one of their own whatever the topology."""
    singled = set(alone)
    rest = [key for key in keys if key not in singled]
    size = 1 if topology == "per_engine" else max_unavailable or max(1, len(rest))
    return [[key] for key in keys if key in singled] + [
        rest[start : start + size] for start in range(0, len(rest), size)
    ]


def choose_backend(wanted: str, *, ours: dict[str, str], engines: Sequence[Alive]) -> tuple[str, str]:
    """(`nccl` or `gloo`, why it is not the NCCL that was wanted). `ours`: `device_facts` of the trainer."""
    if wanted == "gloo":
        return "gloo", ""
    if not all(
        device.startswith("cuda") for device in (ours["device"], *(engine.device for engine in engines))
    ):
        return "gloo", "not everybody is on a GPU" if wanted == "nccl" else ""
    versions = {
        version for version in (ours["nccl_version"], *(engine.nccl_version for engine in engines)) if version
    }
    if len(versions) > 1:
        return "gloo", f"NCCL versions differ: {', '.join(sorted(versions))}"
    uuids = [uuid for uuid in (ours["device_uuid"], *(engine.device_uuid for engine in engines)) if uuid]
    if len(set(uuids)) < len(uuids):
        return "gloo", "two of them share a GPU"
    return "nccl", ""


class NcclTrial:
    """What to use where everybody seems able to use NCCL; SGLang tells neither its version nor its GPU, so only a push can show. Pure.

    UNTRIED -> pushed, unbroken -> PROVEN
            -> broken -> OUT: `auto` means gloo from now on; `nccl` insists
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        """As `weights.backend`, until NCCL is out."""
        self._is_proven = False

    def report(self, *, broken: str) -> None:
        """What came of an epoch over NCCL."""
        if not broken:
            self._is_proven = True
        elif self.wanted == "auto" and not self._is_proven:
            self.wanted = "gloo"
            log.warning(
                "weights travel over gloo from now on: the first epoch over NCCL broke (%s); weights.backend=nccl insists",
                broken,
            )


class Broadcaster:
    """Pushes snapshots to servers. Knows neither the buffer nor optimizer steps; one `push` at a time."""

    def __init__(self, config: WeightsConfig, *, device: str, incarnation: int) -> None:
        self._config = config
        self._device = torch.device(device)
        self._incarnation = incarnation
        self._members: dict[Key, Member] = {}
        self._directory: dict[Key, ServerEntry] = {}
        self._shunning = ReceiverBackoff()
        self._survived: Counter[Key] = Counter()
        """Broken broadcasts in a row that a server survived without anybody being to blame."""
        self._epochs: dict[frozenset[Key], WeightGroupSession] = {}
        self._warned = ""
        self._nccl = NcclTrial(config.backend)
        self.num_epochs = 0
        """Groups formed so far, or tried."""

    def eligible(self, servers: Iterable[ServerEntry]) -> list[ServerEntry]:
        """Those of the directory that a push would go to now."""
        now_s = time.monotonic()
        return [entry for entry in servers if self._shunning.is_eligible(entry, now_s=now_s)]

    async def push(
        self, snapshot: Snapshot, *, version: int, step: int, servers: Sequence[ServerEntry]
    ) -> PushOutcome:
        """Sends an acquired snapshot to every eligible server of the directory and waits for activation.

        Never raises for what a server does: its reason is in the outcome. Raises ConfigError when weights.host is no address of ours.
        """
        self._directory = {key_of(entry): entry for entry in servers}
        self._shunning.forget_all_but(self._directory)
        wanted = self.eligible(servers)
        await self._forget_all_but({key_of(entry) for entry in wanted})
        cohorts = split_groups(
            [key_of(entry) for entry in wanted],
            topology=self._config.topology,
            max_unavailable=self._config.max_unavailable,
            alone=[key for key, count in self._survived.items() if count >= _PROBE_AFTER],
        )
        await self._dissolve_all_but(frozenset(cohort) for cohort in cohorts)
        outcome = PushOutcome()
        places = asyncio.Semaphore(self._config.max_unavailable or len(cohorts) or 1)
        if self._config.topology == "shared" and self._config.max_unavailable:
            places = asyncio.Semaphore(1)

        async def one(cohort: list[Key]) -> None:
            async with places:
                await self._push_to(cohort, snapshot, outcome, version=version, step=step)

        await asyncio.gather(*map(one, cohorts))
        return outcome

    async def close(self) -> None:
        """Dissolves the groups and closes every link."""
        await self._dissolve_all_but(())
        for member in self._members.values():
            member.link.close()

    async def _push_to(
        self, cohort: list[Key], snapshot: Snapshot, outcome: PushOutcome, *, version: int, step: int
    ) -> None:
        epoch = await self._epoch(cohort, outcome)
        if epoch is None:
            return
        request = PushWeights(
            epoch=epoch.number,
            group_name=epoch.group.group_name,
            version=version,
            step=step,
            update_mode=self._config.update_mode,
            manifest=Manifest(version=version, buckets=snapshot.buckets).to_dict(),
            timeout_s=self._config.push_deadline_s,
        )
        pushed = await epoch.push(request, snapshot)
        if epoch.group.backend == "nccl":
            self._nccl.report(broken=pushed.broken)
        outcome.recovery_s |= pushed.recovery_s
        if pushed.broken:
            outcome.failed["broadcast"] = pushed.broken
        activated = self._settle(epoch, pushed, outcome, version=version)
        if activated < len(epoch.members) or pushed.broken:
            await self._dissolve(epoch, is_broken=bool(pushed.broken))

    async def _epoch(self, cohort: list[Key], outcome: PushOutcome) -> WeightGroupSession | None:
        """The cohort's epoch, formed if it is new, of those who are alive. None when there is none; the reasons are in the outcome."""
        if (epoch := self._epochs.get(frozenset(cohort))) is not None:
            return epoch
        members = [self._member(self._directory[key]) for key in cohort]
        alive = dict[Key, Alive]()
        for member, answer in zip(
            members,
            await asyncio.gather(*(m.ask(AskAlive(), timeout_s=ALIVE_S) for m in members)),
            strict=True,
        ):
            if isinstance(answer, Alive):
                alive[member.key] = answer
            else:
                self._blame(member, answer, outcome)
        members = [member for member in members if member.key in alive]
        if not members:
            return None
        epoch = self._new_epoch(members, [alive[member.key] for member in members])
        formed = await epoch.form()
        if self._settle(epoch, formed, outcome) < len(members) or formed.broken:
            await epoch.dissolve(is_broken=False)
            return None
        log.info(
            "epoch %d: %s over %s",
            epoch.number,
            [member.entry.name for member in members],
            epoch.group.backend,
        )
        self._epochs[epoch.keys] = epoch
        return epoch

    def _new_epoch(self, members: list[Member], alive: list[Alive]) -> WeightGroupSession:
        self.num_epochs += 1
        backend, warning = choose_backend(self._nccl.wanted, ours=device_facts(self._device), engines=alive)
        if warning and warning != self._warned:
            log.warning("weights travel over gloo: %s", warning)
        self._warned = warning
        seats, world_size = rank_ranges(members, alive)
        try:
            group = WeightGroup.create(
                host=self._config.host,
                world_size=world_size,
                group_name=f"weights-{self._incarnation}-{self.num_epochs}",
                backend=backend,
                timeout_s=min(self._config.push_deadline_s, _FORM_S),
            )
        except WeightSyncError as error:
            raise ConfigError(
                f"{error}: set weights.host to an address of the machine of trainer rank 0"
            ) from None
        return WeightGroupSession(number=self.num_epochs, group=group, seats=seats, device=self._device)

    def _settle(
        self,
        epoch: WeightGroupSession,
        result: SessionOutcome,
        outcome: PushOutcome,
        *,
        version: int | None = None,
    ) -> int:
        """Sorts the answers to a push (or, without `version`, to an invitation); how many did what was asked."""
        num_succeeded = 0
        for member, answer in zip(epoch.members, result.answers, strict=True):
            if isinstance(answer, WeightsOk) and version in (None, answer.version):
                num_succeeded += 1
                if version is not None:
                    outcome.activated[member.entry.name] = answer
                    self._shunning.succeeded(member.key)
                    del self._survived[member.key]
            elif member.key in result.blameless and (
                len(epoch.members) > 1 or self._survived[member.key] < _PROBE_AFTER
            ):
                outcome.failed[member.entry.name] = _reason(answer, version)
                self._survived[member.key] += 1
            else:
                self._blame(member, answer, outcome, version=version)
        return num_succeeded

    def _blame(
        self, member: Member, answer: Answer, outcome: PushOutcome, *, version: int | None = None
    ) -> None:
        outcome.failed[member.entry.name] = _reason(answer, version)
        self._shunning.failed(self._directory[member.key], now_s=time.monotonic())
        del self._survived[member.key]

    def _member(self, entry: ServerEntry) -> Member:
        key = key_of(entry)
        if key not in self._members:
            self._members[key] = Member(entry=entry, link=Link(entry.weights_address, handler=lambda _: None))
        return self._members[key]

    async def _forget_all_but(self, keys: set[Key]) -> None:
        gone = self._members.keys() - keys
        await asyncio.gather(
            *(
                self._dissolve(epoch, is_broken=False)
                for epoch in list(self._epochs.values())
                if epoch.keys & gone
            )
        )
        for key in gone:
            self._members.pop(key).link.close()
            del self._survived[key]

    async def _dissolve_all_but(self, kept: Iterable[frozenset[Key]]) -> None:
        unwanted = self._epochs.keys() - set(kept)
        await asyncio.gather(*(self._dissolve(self._epochs[keys], is_broken=False) for keys in unwanted))

    async def _dissolve(self, epoch: WeightGroupSession, *, is_broken: bool) -> None:
        self._epochs.pop(epoch.keys, None)
        await epoch.dissolve(is_broken=is_broken)


def _reason(answer: Answer, version: int | None) -> str:
    if isinstance(answer, WeightsFailed):
        return answer.reason
    if isinstance(answer, WeightsOk):
        return f"is at version {answer.version} after the push of {version}"
    return f"answered {type(answer).__name__}"
