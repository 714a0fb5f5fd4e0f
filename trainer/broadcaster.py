"""Rank 0's end of the weight plane: process groups of the engines that are there, and buckets through them.

    no epoch -> (ask who is alive) -> forming -> FORMED -> push -> push -> ... -> dissolved (membership changed, or a push failed)

A server that fails, or that is silent past its deadline, is left out for a while, twice as long each time, or until it says something
new in the directory (a restart, another state or version): a bad engine costs a deadline now and then and not one a push, and a healthy
one that was slow once is not lost for ever. A dead peer breaks the broadcast at once; survivors are then told to leave the group, answer,
and meet again in the next epoch.

Control messages run in the caller's event loop, blocking collectives in one thread of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from areal_like.channel import Link
from areal_like.collective import WeightGroup
from areal_like.config import WeightsConfig
from areal_like.errors import ArealError, ConfigError, WeightSyncError
from areal_like.messages.consumer import ServerEntry
from areal_like.messages.weights import AskAlive, DissolveGroup, FormGroup, PushWeights, WeightsFailed, WeightsOk
from areal_like.weights import Bucket, Manifest

log = logging.getLogger(__name__)

_ALIVE_S = 2.0
"""How fast a healthy control socket answers; also the grace for survivors of a broken broadcast."""

_FORM_S = 15.0
"""Longest rendezvous of members that have just said that they are alive; also the time limit of one bucket's broadcast."""

_SHUN_S, _MAX_SHUN_S = 5.0, 300.0
"""How long a server is left out after its first failure, and after many."""

_Key = tuple[str, int]
_Answer = WeightsOk | WeightsFailed


@dataclass(frozen=True, kw_only=True)
class PushOutcome:
    """Who has the new version active, and why others have not."""

    activated: dict[str, WeightsOk] = field(default_factory=dict)
    """Server name -> its answer."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server name -> reason."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    entry: ServerEntry
    link: Link

    @property
    def key(self) -> _Key:
        return _key(self.entry)

    async def ask(self, request: Any, *, timeout_s: float) -> _Answer:
        try:
            answer = await self.link.call(request, timeout_s=timeout_s)
        except ArealError as error:
            return WeightsFailed(version=-1, reason=str(error))
        if not isinstance(answer, (WeightsOk, WeightsFailed)):
            return WeightsFailed(version=-1, reason=f"answered {type(answer).__name__} to {type(request).__name__}")
        return answer


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    number: int
    group: WeightGroup
    members: list[_Member]


@dataclass(frozen=True, kw_only=True)
class _Shunned:
    entry: ServerEntry
    """What the directory said of it when it failed."""
    for_s: float
    until_s: float


class Broadcaster:
    """Pushes buckets to servers. Knows neither the buffer nor optimizer steps; one `push` at a time."""

    def __init__(self, config: WeightsConfig, *, device: str, incarnation: int) -> None:
        self._config = config
        self._device = device
        self._incarnation = incarnation
        self._members: dict[_Key, _Member] = {}
        self._directory: dict[_Key, ServerEntry] = {}
        self._shunned: dict[_Key, _Shunned] = {}
        self._epoch: _Epoch | None = None
        self._num_epochs = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")

    @property
    def num_epochs(self) -> int:
        """Groups formed so far."""
        return self._num_epochs

    def eligible(self, servers: Iterable[ServerEntry]) -> list[ServerEntry]:
        """Those of the directory that a push would go to now."""
        return [entry for entry in servers if self._is_eligible(entry)]

    async def push(
        self, buckets: Sequence[tuple[Bucket, torch.Tensor]], *, version: int, step: int, servers: Sequence[ServerEntry]
    ) -> PushOutcome:
        """Sends flattened buckets (uint8[num_bytes] each) to every eligible server of the directory and waits for activation.

        Never raises for what a server does: its reason is in the outcome. Raises ConfigError when weights.host is no address of ours.
        """
        self._directory = {_key(entry): entry for entry in servers}
        self._shunned = {key: shunned for key, shunned in self._shunned.items() if key in self._directory}
        epoch, failed = await self._form(self.eligible(servers))
        if epoch is None:
            return PushOutcome(failed=failed)
        request = PushWeights(
            epoch=epoch.number,
            group_name=epoch.group.group_name,
            version=version,
            step=step,
            update_mode=self._config.update_mode,
            manifest=Manifest(version=version, buckets=tuple(bucket for bucket, _ in buckets)).to_dict(),
            timeout_s=self._config.push_deadline_s,
        )
        asked = [asyncio.create_task(member.ask(request, timeout_s=self._config.push_deadline_s)) for member in epoch.members]
        broken = await self._send(epoch.group, [data for _, data in buckets])
        if broken:
            # Survivors may be blocked in the broadcast that the dead peer broke: telling them to leave makes them answer.
            await asyncio.gather(self._farewell(epoch), asyncio.wait(asked, timeout=_ALIVE_S))
        else:
            await self._while_alive(epoch.members, asked)
        for task in asked:
            task.cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        # Whoever reports the broken broadcast survived it; whoever broke it is silent.
        blameless = {m.key for m, answer in zip(epoch.members, answers, strict=True) if broken and isinstance(answer, WeightsFailed)}
        activated, refused = self._settle(epoch.members, answers, version=version, blameless=blameless)
        if broken or refused:
            await self._leave()
        return PushOutcome(activated=activated, failed=failed | refused | ({"broadcast": broken} if broken else {}))

    async def close(self) -> None:
        """Dissolves the group and closes every link."""
        if self._epoch is not None:
            await self._farewell(self._epoch)
            await self._leave()
        for member in self._members.values():
            member.link.close()
        self._thread.shutdown(wait=False)

    def _is_eligible(self, entry: ServerEntry) -> bool:
        if not entry.weights_address or entry.state in ("starting", "draining"):
            return False
        shunned = self._shunned.get(_key(entry))
        if shunned is None or time.monotonic() >= shunned.until_s:
            return True
        return (shunned.entry.state, shunned.entry.weights_version) != (entry.state, entry.weights_version)

    def _shun(self, key: _Key) -> None:
        before = self._shunned.get(key)
        for_s = min(_MAX_SHUN_S, 2 * before.for_s) if before else _SHUN_S
        self._shunned[key] = _Shunned(entry=self._directory[key], for_s=for_s, until_s=time.monotonic() + for_s)

    async def _form(self, wanted: list[ServerEntry]) -> tuple[_Epoch | None, dict[str, str]]:
        if self._epoch is not None:
            if {member.key for member in self._epoch.members} == {_key(entry) for entry in wanted}:
                return self._epoch, {}
            await self._farewell(self._epoch)
            await self._leave()
        self._forget_all_but(wanted)
        members = [self._member(entry) for entry in wanted]
        alive = await asyncio.gather(*(member.ask(AskAlive(), timeout_s=_ALIVE_S) for member in members))
        _, failed = self._settle(members, alive)
        members = [member for member in members if member.entry.name not in failed]
        if not members:
            return None, failed
        epoch = self._new_epoch(members)
        answers = [
            asyncio.create_task(member.ask(self._invitation(epoch, rank), timeout_s=epoch.group.timeout_s + 2 * _ALIVE_S))
            for rank, member in enumerate(members, start=1)
        ]
        self._epoch = epoch
        blameless: set[_Key] = set()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, epoch.group.connect)
        except WeightSyncError as error:
            log.warning("epoch %d was not formed: %s", epoch.number, error)
            # Whoever is still waiting in the rendezvous did what it was asked; it answers when told to leave.
            blameless = {member.key for member, answer in zip(members, answers, strict=True) if not answer.done()}
            await self._farewell(epoch)
        _, refused = self._settle(members, await asyncio.gather(*answers), blameless=blameless)
        if refused or blameless:
            await self._leave()
            return None, failed | refused
        log.info("epoch %d: %s over %s", epoch.number, [member.entry.name for member in members], epoch.group.backend)
        return epoch, failed

    def _new_epoch(self, members: list[_Member]) -> _Epoch:
        self._num_epochs += 1
        try:
            group = WeightGroup.create(
                host=self._config.host,
                world_size=1 + len(members),
                group_name=f"weights-{self._incarnation}-{self._num_epochs}",
                backend=self._backend(members),
                timeout_s=min(self._config.push_deadline_s, _FORM_S),
            )
        except WeightSyncError as error:
            raise ConfigError(f"{error}: set weights.host to an address of the machine of trainer rank 0") from None
        return _Epoch(number=self._num_epochs, group=group, members=members)

    def _invitation(self, epoch: _Epoch, rank: int) -> FormGroup:
        return FormGroup(
            epoch=epoch.number,
            group_name=epoch.group.group_name,
            master_address=epoch.group.address,
            master_port=epoch.group.port,
            rank=rank,
            world_size=epoch.group.world_size,
            backend=epoch.group.backend,
            timeout_s=epoch.group.timeout_s + _ALIVE_S,  # after us, so that we can tell who is waiting from who refused
        )

    def _backend(self, members: list[_Member]) -> str:
        on_gpus = all(device.startswith("cuda") for device in (self._device, *(member.entry.device for member in members)))
        if self._config.backend == "nccl" and not on_gpus:
            log.warning("weights.backend=nccl needs the trainer and every engine on GPUs: using gloo")
        return "nccl" if on_gpus and self._config.backend != "gloo" else "gloo"

    async def _while_alive(self, members: list[_Member], asked: list[asyncio.Task[_Answer]]) -> None:
        """Waits for answers, but not for a server that has died with the whole broadcast in its socket's buffer."""
        pending = dict(zip(asked, members, strict=True))
        while pending:
            done, _ = await asyncio.wait(pending, timeout=_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                alive = await asyncio.gather(*(member.ask(AskAlive(), timeout_s=_ALIVE_S) for member in pending.values()))
                done = {task for task, answer in zip(pending, alive, strict=True) if isinstance(answer, WeightsFailed)}
            for task in done:
                del pending[task]

    async def _send(self, group: WeightGroup, data: list[torch.Tensor]) -> str:
        """Broadcasts; returns why it broke, or nothing."""

        def send_all() -> None:
            for bucket in data:
                group.broadcast(bucket)

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, send_all)
        except WeightSyncError as error:
            return str(error)
        return ""

    def _settle(
        self,
        members: list[_Member],
        answers: Sequence[_Answer | BaseException],
        *,
        version: int | None = None,
        blameless: Set[_Key] = frozenset(),
    ) -> tuple[dict[str, WeightsOk], dict[str, str]]:
        """Sorts answers: who did what was asked, and the reasons of those who did not, who are shunned unless blameless."""
        succeeded, failed = {}, {}
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, WeightsOk) and version in (None, answer.version):
                succeeded[member.entry.name] = answer
                if version is not None:
                    self._shunned.pop(member.key, None)
                continue
            if isinstance(answer, WeightsFailed):
                failed[member.entry.name] = answer.reason
            elif isinstance(answer, WeightsOk):
                failed[member.entry.name] = f"is at version {answer.version} after the push of {version}"
            else:
                failed[member.entry.name] = "silent"
            if member.key not in blameless:
                self._shun(member.key)
        return succeeded, failed

    def _member(self, entry: ServerEntry) -> _Member:
        key = _key(entry)
        if key not in self._members:
            self._members[key] = _Member(entry=entry, link=Link(entry.weights_address, handler=lambda _: None))
        return self._members[key]

    def _forget_all_but(self, wanted: list[ServerEntry]) -> None:
        keys = {_key(entry) for entry in wanted}
        for key in self._members.keys() - keys:
            self._members.pop(key).link.close()

    async def _farewell(self, epoch: _Epoch) -> None:
        request = DissolveGroup(epoch=epoch.number, group_name=epoch.group.group_name)
        await asyncio.gather(*(member.ask(request, timeout_s=_ALIVE_S) for member in epoch.members))

    async def _leave(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, epoch.group.close)


def _key(entry: ServerEntry) -> _Key:
    return entry.name, entry.incarnation
