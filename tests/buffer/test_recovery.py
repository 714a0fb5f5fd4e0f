"""A buffer process that is killed and started again: the behavior that its peers observe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import RefusedError
from areal_like.paths import RunPaths
from areal_like.wire.fingerprint import dataset_fingerprint
from areal_like.wire.messages.consumer import (
    AllocVersion,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    Fetch,
    GetRunCounters,
    StartTraining,
)
from areal_like.wire.messages.hello import HelloRequired
from areal_like.wire.messages.producer import Lease, Leases, SampleAck, Samples
from tests.support.buffer_harness import (
    BufferProcess,
    FakeTrainer,
    beat,
    connected,
    job,
    running_buffer,
    trainer_hello,
    until,
)
from tests.support.fake_producer import hello
from tests.support.ledger_simulation import done
from tests.support.waiting import HANG_LIMIT_S


def sample(lease: Lease, index: int) -> Samples:
    return Samples(samples=[done(lease, index, [0], reward=float(index))])


def test_the_ledger_survives_sigkill_of_the_buffer(tmp_path: Path) -> None:
    config = job(tmp_path, trainer={"num_steps": 6, "groups_per_step": 2})
    server = hello("rollout-0", dataset=dataset_fingerprint(config))
    rank = trainer_hello(config)

    async def first(buffer: BufferProcess) -> tuple[list[Lease], list[int]]:
        inbox: list[Any] = []
        async with connected(buffer, rank) as link, connected(buffer, server, inbox=inbox) as producer:
            trainer = FakeTrainer(config, link)
            await trainer.call(StartTraining(step=0))
            producer.send(beat([], free=8))
            leases = [lease for message in await until(inbox, Leases) for lease in message.leases]
            assert len(leases) == 4
            for lease in leases[:2]:
                for index in (0, 1):
                    producer.send(sample(lease, index))
            producer.send(sample(leases[2], 0))
            await until(inbox, SampleAck, count=5)
            tickets = [group.ticket_id for group in await trainer.train(0)]
            assert (await trainer.call(AllocVersion(step=1))).version == 1
            return leases, tickets

    async def second(buffer: BufferProcess, leases: list[Lease], tickets: list[int]) -> None:
        inbox: list[Any] = []
        async with connected(buffer) as link, connected(buffer, inbox=inbox) as producer:
            producer.send(sample(leases[2], 0))
            await until(inbox, HelloRequired)
            for older in (
                trainer_hello(config, incarnation=1),
                hello("rollout-0", dataset=server.dataset, incarnation=1),
            ):
                with pytest.raises(RefusedError, match="incarnation"):
                    await link.call(older, timeout_s=HANG_LIMIT_S)
            await link.call(rank, timeout_s=HANG_LIMIT_S)
            await producer.call(server, timeout_s=HANG_LIMIT_S)
            producer.send(beat(leases[2:], free=0))
            for message in (
                sample(leases[2], 0),
                sample(leases[2], 1),
                sample(leases[3], 0),
                sample(leases[3], 1),
            ):
                producer.send(message)
            acks = await until(inbox, SampleAck, count=4)
            assert [ack.refused for ack in acks] == [""] * 4, "a lease did not survive"
            trainer = FakeTrainer(config, link)
            assert [group.ticket_id for group in await trainer.groups(0)] == tickets, (
                "an uncommitted step is served again"
            )
            groups = await trainer.train(1)
            assert sorted(group.ticket_id for group in groups) == [lease.ticket_id for lease in leases[2:]]
            assert (await trainer.call(AllocVersion(step=2))).version == 2
            await trainer.call(CommitStep(step=1))
            counters = (await trainer.call(GetRunCounters())).counters
            assert (
                counters["samples_duplicate"] == 1
                and counters["samples_accepted"] == 8
                and counters["samples_trained"] == 8
            )

    buffer = BufferProcess(config)
    try:
        leases, tickets = asyncio.run(first(buffer))
    finally:
        buffer.close()  # SIGKILL
    buffer = BufferProcess(config)
    try:
        asyncio.run(second(buffer, leases, tickets))
        assert buffer.terminate() == (0, "")
    finally:
        buffer.close()


def test_a_drain_keeps_recorded_and_ready_groups(tmp_path: Path) -> None:
    totals = []
    for step in (0, 1):
        with running_buffer(tmp_path) as buffer:
            buffer.produce("rollout-0")

            async def run(buffer: BufferProcess = buffer, step: int = step) -> Any:
                async with connected(buffer, trainer_hello(buffer.config)) as link:
                    trainer = FakeTrainer(buffer.config, link)
                    await trainer.call(StartTraining(step=step))
                    await trainer.call(AllocVersion(step=step))
                    await trainer.train(step)
                    await trainer.groups(step + 1)
                    await trainer.call(CommitStep(step=step))
                    await trainer.call(CloseAdmission(reason="drain"))
                    return await trainer.call(GetRunCounters())

            totals.append(asyncio.run(run()))
            assert buffer.terminate() == (0, "")
    first, second = totals
    assert first.tickets["batched"] == 4 and first.tickets["dropped"] == second.tickets["dropped"] == 0
    assert second.tickets["trained"] == 8 and second.tickets["issued"] >= first.tickets["issued"]


def post(buffer: BufferProcess, body: Any) -> tuple[int, Any]:
    """(status, answer) of `POST /control/drop`."""
    request = urllib.request.Request(
        f"http://{buffer.http}/control/drop", data=json.dumps(body).encode(), method="POST"
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_an_operator_drops_a_ticket_that_crashes_trainers(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:
        buffer.produce("rollout-0")

        async def die_in_step_1() -> list[int]:
            async with connected(buffer, trainer_hello(buffer.config)) as link:
                trainer = FakeTrainer(buffer.config, link)
                await trainer.call(StartTraining(step=0))
                await trainer.train(0)
                groups = await trainer.groups(1)
                return [group.ticket_id for group in groups]

        async def resume(poisoned: list[int]) -> None:
            async with connected(buffer, trainer_hello(buffer.config)) as link:
                trainer = FakeTrainer(buffer.config, link)
                await trainer.call(StartTraining(step=0))
                groups = await trainer.groups(1)
                assert groups[2].ticket_id not in poisoned
                assert [groups[i].ticket_id for i in (0, 1, 3)] == [poisoned[i] for i in (0, 1, 3)]
                await trainer.train(0)
                await trainer.call(CompleteStep(step=1))
                await trainer.call(AllocVersion(step=2))
                assert (await trainer.call(Fetch(step=2, position=0), timeout_s=HANG_LIMIT_S)).step == 2

        lists = [asyncio.run(die_in_step_1()) for _ in range(3)]
        assert lists[0] == lists[1] == lists[2]
        named = " ".join(map(str, lists[0]))
        with pytest.raises(RefusedError, match=rf"3 trainers died in step 1, whose tickets are {named}:"):
            asyncio.run(die_in_step_1())
        assert buffer.status()["trainers_lost"]["1"] == {"starts": 3, "tickets": lists[0]}
        for bad in ({}, {"tickets": []}, {"tickets": ["7"]}, {"tickets": [10**9]}):
            status, answer = post(buffer, bad)
            assert status == 400 and answer["error"]
        assert post(buffer, {"tickets": [lists[0][2]]}) == (200, {"dropped": [lists[0][2]]})
        asyncio.run(resume(lists[0]))
        assert buffer.status()["drops"]["poison"] == 1


def test_samples_wait_at_servers_while_the_disk_is_full(tmp_path: Path) -> None:
    """Up to buffer.cache_bytes are taken; what is not acknowledged is sent again later."""
    config = job(tmp_path, buffer={"cache_bytes": 0})
    server = hello("rollout-0", dataset=dataset_fingerprint(config))

    async def run(buffer: BufferProcess, shell: sqlite3.Connection) -> None:
        inbox: list[Any] = []
        async with (
            connected(buffer, trainer_hello(config)) as link,
            connected(buffer, server, inbox=inbox) as producer,
        ):
            trainer = FakeTrainer(config, link)
            await trainer.call(StartTraining(step=0))
            producer.send(beat([], free=2))
            (leases,) = await until(inbox, Leases)
            (lease,) = leases.leases

            async def trouble() -> str:
                return str((await producer.call(beat([lease], free=0), timeout_s=HANG_LIMIT_S)).trouble)

            async def num_accepted() -> float:
                return float((await trainer.call(GetRunCounters())).counters["samples_accepted"])

            shell.execute("BEGIN IMMEDIATE")
            producer.send(sample(lease, 0))
            async with asyncio.timeout(HANG_LIMIT_S):
                while not await trouble():
                    await asyncio.sleep(0.02)
            producer.send(sample(lease, 1))
            assert await trouble() and await num_accepted() == 1
            shell.execute("ROLLBACK")
            await until(inbox, SampleAck)
            producer.send(sample(lease, 1))
            acks = await until(inbox, SampleAck, count=2)
            assert [ack.refused for ack in acks] == ["", ""] and await num_accepted() == 2

    buffer = BufferProcess(config)
    try:
        ledger = RunPaths.of(config).ledger / "ledger.sqlite3"
        with contextlib.closing(sqlite3.connect(ledger, isolation_level=None)) as shell:
            asyncio.run(run(buffer, shell))
    finally:
        buffer.close()
