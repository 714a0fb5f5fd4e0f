"""The buffer process over real sockets, with fake producers as processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pickle
import random
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from areal_like.config import from_mapping
from areal_like.errors import ArealError, DeadlineError, RefusedError
from areal_like.failures import FailureKind
from areal_like.wire.codec import encode
from areal_like.wire.fingerprint import dataset_fingerprint, shared_settings
from areal_like.wire.messages.consumer import (
    AllocVersion,
    CloseAdmission,
    CommitStep,
    Fetch,
    GetRunCounters,
    GetStreamState,
    RequestEval,
    StartTraining,
)
from areal_like.wire.messages.hello import Goodbye, HelloRequired, JobFailed, Role
from areal_like.wire.messages.producer import (
    AbortLeases,
    HeartbeatAck,
    Lease,
    Leases,
    Purpose,
    SampleAck,
    SampleDone,
    SampleFailed,
    Samples,
)
from areal_like.wire.records import Record
from tests.support.buffer_harness import (
    BufferProcess,
    beat,
    connected,
    job,
    running_buffer,
    trainer_hello,
    training,
    until,
)
from tests.support.fake_producer import hello
from tests.support.ledger_simulation import trajectory
from tests.support.waiting import HANG_LIMIT_S


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[BufferProcess]:
    with running_buffer(tmp_path) as process:
        yield process


@pytest.fixture
def plain_buffer(tmp_path: Path) -> Iterator[BufferProcess]:
    """A buffer that shares no memory, for a test of its size."""
    with running_buffer(tmp_path, is_forked=False) as process:
        yield process


def num_serving(status: dict[str, Any]) -> int:
    """Rollout servers that are registered and have said that they serve."""
    return sum(peer["role"] == "rollout" and peer["state"] == "serving" for peer in status["peers"])


def test_a_whole_run_with_two_producers(buffer: BufferProcess) -> None:
    for name in ("rollout-0", "rollout-1"):
        buffer.produce(name)
    # One of them alone could make all samples before the other one has started.
    buffer.wait_status(lambda status: num_serving(status) == 2)
    config = buffer.config

    directories: list[Any] = []

    async def run() -> tuple[Any, list[int]]:
        tickets = []
        async with training(buffer, directories=directories) as trainer:
            before = await trainer.call(
                RequestEval(eval_id=0, num_prompts=8, min_version=0), timeout_s=HANG_LIMIT_S
            )
            assert (before.num_evaluated, before.num_failed) == (8, 0)
            assert (before.rewards.mean(), before.tokens.mean()) == (3.5, 2.0)
            for step in range(config.trainer.num_steps):
                groups = await trainer.train(step)
                tickets += [group.ticket_id for group in groups]
                assert [group.position for group in groups] == list(range(4))
                assert all(0 <= step - oldest <= 1 for group in groups for oldest in group.version_steps)
                assert all(
                    t.reward == float(group.prompt_index) for group in groups for t in group.trajectories
                )
                again = await trainer.groups(step)
                assert [group.ticket_id for group in again] == [group.ticket_id for group in groups]
                version = (await trainer.call(AllocVersion(step=step + 1))).version
                assert version == step + 1
            state = await trainer.call(GetStreamState(step=5))
            assert state.stream["pending"] == [] and state.stream["cursor"] == 24
            await trainer.call(CommitStep(step=5, oldest_kept_step=6))
            await trainer.call(CommitStep(step=5))
            await trainer.call(CloseAdmission(reason="finished"))
            after = await trainer.call(
                RequestEval(eval_id=1, num_prompts=8, min_version=version), timeout_s=HANG_LIMIT_S
            )
            assert after.oldest_version == version
            return await trainer.call(GetRunCounters()), tickets

    totals, tickets = asyncio.run(run())
    assert len(set(tickets)) == 24
    serving = [(entry.name, entry.state) for entry in directories[-1].servers]
    assert serving == [("rollout-0", "serving"), ("rollout-1", "serving")]
    assert totals.tickets == {
        "queued": 0, "leased": 0, "ready": 0, "batched": 0,
        "closed": 0, "trained": 24, "evaluated": 16, "split": 0, "dropped": 0, "issued": 40,
    }  # fmt: skip
    assert totals.counters["tokens_trained"] == 24 * 2 * 2 and totals.counters["max_trained_lag"] <= 1
    assert (totals.counters["generation_busy_s"], totals.counters["generation_idle_s"]) == (6.0, 2.0)
    status = buffer.wait_status(lambda status: status["counters"]["samples_trained"] == 48)
    assert sum(status["lag_histogram"].values()) == 48 and status["buffer_bytes"] == 0
    for line in (
        'areal_tickets{state="trained"} 24.0',
        'areal_tickets_dropped_total{reason="stale"} 0.0',
        'areal_peers{role="rollout"} 2.0',
        'areal_ticket_queue_seconds_count{state="batched"} 24.0',
        "areal_lease_seconds_count 40.0",
    ):
        buffer.wait_status(lambda _, line=line: line in buffer.get("/metrics"))
    code, stderr = buffer.terminate()
    assert (code, stderr) == (0, "")


def test_a_buffer_is_ready_when_it_can_write(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as before:
        before.wait_status(lambda status: not status["not_ready"])
        assert before.terminate()[0] == 0
    reasons: list[str] = []

    def is_locked(status: dict[str, Any]) -> bool:
        reasons.append(status["not_ready"])
        return "another program holds" in reasons[-1]

    database = before.paths.ledger / "ledger.sqlite3"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with running_buffer(tmp_path) as buffer:
            buffer.wait_status(is_locked)
            assert all(reasons), "it was ready before it could write"
            shell.execute("ROLLBACK")
            buffer.wait_status(lambda status: not status["not_ready"])


def test_leases_of_a_killed_producer_go_to_the_other(tmp_path: Path) -> None:
    with running_buffer(tmp_path, buffer={"lease_timeout_s": 4.0}) as buffer:
        check_leases_of_a_killed_producer(buffer)


def check_leases_of_a_killed_producer(buffer: BufferProcess) -> None:
    killed = buffer.produce("rollout-0", sample_s=3600.0)

    async def run() -> Any:
        async with training(buffer) as trainer:
            await asyncio.to_thread(buffer.wait_status, lambda status: status["tickets"]["leased"] == 4)
            killed.send_signal(signal.SIGKILL)
            await asyncio.to_thread(buffer.wait_status, lambda status: status["counters"]["leases_lost"] == 4)
            buffer.produce("rollout-1")  # not before: it would have to send heartbeats in time meanwhile
            for step in range(6):
                await trainer.train(step)
                await trainer.call(AllocVersion(step=step + 1))
            return await trainer.call(GetRunCounters())

    totals = asyncio.run(run())
    assert totals.counters["leases_lost"] == 4
    assert totals.tickets["batched"] == 24 and totals.tickets["issued"] == 24
    assert [peer["name"] for peer in buffer.status()["peers"] if peer["role"] == "rollout"] == ["rollout-1"]


def test_garbage_is_counted_and_changes_nothing(plain_buffer: BufferProcess) -> None:
    buffer = plain_buffer
    rng = random.Random(0)
    good = encode(trainer_hello(buffer.config), rid=1)
    sample = encode(Samples(samples=[SampleDone(lease_id=1, record=Record.of(1, 0, trajectory([0])))]))
    broken = [
        [b""],
        [pickle.dumps({"a": 1})],
        [good[0][: len(good[0]) // 2]],
        [good[0], b"x", b"y"],
        [sample[0], sample[1][:3]],
        [b"\xff" * 1000],
        [b"\x90"],
    ]
    socket_ = zmq.Context.instance().socket(zmq.DEALER)
    socket_.set(zmq.LINGER, 1000)
    socket_.connect(buffer.address)
    try:
        for frames in broken:
            socket_.send_multipart(frames)
        # The sample is cut off, but its sender has not registered, so nobody looks at it.
        buffer.wait_status(
            lambda status: (status["bad_frames"], status["unregistered_frames"]) == (len(broken) - 1, 1)
        )
        before = buffer.rss_bytes()
        # In portions, so that few messages wait in the sockets.
        for num_sent in range(1000, 11_000, 1000):
            for _ in range(1000):
                socket_.send_multipart(
                    [rng.randbytes(rng.randrange(1, 200)) for _ in range(rng.randrange(1, 4))]
                )
            buffer.wait_status(
                lambda status, num_sent=num_sent: status["bad_frames"] == len(broken) - 1 + num_sent,
            )
        assert buffer.rss_bytes() < before * 1.1 + (8 << 20)
    finally:
        socket_.close()

    async def still_works() -> None:
        async with training(buffer) as trainer:
            assert (await trainer.call(GetRunCounters())).tickets["issued"] == 0

    asyncio.run(still_works())
    buffer.wait_status(lambda _: "areal_bad_frames_total 10006.0" in buffer.get("/metrics"))


def test_hello_and_role_checks(buffer: BufferProcess) -> None:
    config = buffer.config
    dataset = dataset_fingerprint(config)

    async def run() -> None:
        inbox: list[Any] = []
        async with connected(buffer, inbox=inbox) as link:
            with pytest.raises(DeadlineError):
                await link.call(GetRunCounters(), timeout_s=0.3)
            await until(inbox, HelloRequired)
            assert inbox == [HelloRequired()]
            for field in ("job", "dataset"):
                with pytest.raises(RefusedError, match=rf"\({field}\): differs from the job's"):
                    await link.call(trainer_hello(config, **{field: "other"}), timeout_s=HANG_LIMIT_S)
            smaller = from_mapping(
                {"trainer": {"groups_per_step": 2, "num_steps": 6}, "sampling": {"group_size": 2}}
            )
            with pytest.raises(RefusedError, match=r"\(settings\): differs"):
                await link.call(
                    trainer_hello(config, settings=shared_settings(smaller, Role.TRAINER)),
                    timeout_s=HANG_LIMIT_S,
                )
            # A refused peer does not determine the model that other peers need.
            with pytest.raises(RefusedError, match="num_train_prompts"):
                await link.call(
                    hello("rollout-9", dataset=dataset, model="another model", num_train_prompts=0),
                    timeout_s=HANG_LIMIT_S,
                )
            await link.call(trainer_hello(config), timeout_s=HANG_LIMIT_S)
            with pytest.raises(RefusedError, match=r"\(model\): differs"):
                await link.call(hello("rollout-0", dataset=dataset, model="other"), timeout_s=HANG_LIMIT_S)
            with pytest.raises(RefusedError, match="a different name"):
                await link.call(hello("trainer-0", dataset=dataset), timeout_s=HANG_LIMIT_S)
            with pytest.raises(RefusedError, match="num_train_prompts"):
                await link.call(
                    hello("rollout-0", dataset=dataset, num_train_prompts=0), timeout_s=HANG_LIMIT_S
                )
        replaced: list[Any] = []
        first = trainer_hello(config)
        async with connected(buffer, first, inbox=replaced, answers=False) as old:
            async with connected(buffer, trainer_hello(config)) as new:
                with pytest.raises(DeadlineError):
                    await old.call(StartTraining(step=0), timeout_s=0.3)
                await until(replaced, HelloRequired)
                with pytest.raises(RefusedError, match="incarnation"):
                    await old.call(dataclasses.replace(first, incarnation=2), timeout_s=HANG_LIMIT_S)
                await new.call(StartTraining(step=0), timeout_s=HANG_LIMIT_S)
                with pytest.raises(RefusedError, match="not for a trainer"):
                    await new.call(
                        SampleFailed(
                            lease_id=1,
                            ticket_id=1,
                            sample_index=0,
                            kind=FailureKind.REWARD,
                            num_tokens=0,
                            error="",
                        ),
                        timeout_s=HANG_LIMIT_S,
                    )
                with pytest.raises(RefusedError, match="step"):
                    await new.call(Fetch(step=6, position=0), timeout_s=HANG_LIMIT_S)
            rank_1 = dataclasses.replace(first, name="trainer-1", rank=1, process="1" * 32)
            async with connected(buffer, rank_1) as other_rank:
                with pytest.raises(RefusedError, match="only rank 0"):
                    await other_rank.call(CommitStep(step=0), timeout_s=HANG_LIMIT_S)

    asyncio.run(run())


def test_a_server_resends_fails_and_leaves(buffer: BufferProcess) -> None:
    config = buffer.config

    async def run() -> None:
        inbox: list[Any] = []
        async with training(buffer) as trainer:
            async with connected(
                buffer, hello("rollout-0", dataset=dataset_fingerprint(config)), inbox=inbox
            ) as link:
                unknown = Lease(
                    lease_id=77,
                    ticket_id=1,
                    prompt_index=0,
                    purpose=Purpose.TRAIN,
                    sample_indices=[0],
                    seed=0,
                )
                link.send(beat([unknown], free=1))
                (abort,) = await until(inbox, AbortLeases)
                assert abort.leases == [77], "a lease of an earlier buffer is aborted"
                ((lease,),) = [message.leases for message in await until(inbox, Leases)]
                assert len(await until(inbox, HeartbeatAck)) == 1
                sample = Samples(
                    samples=[
                        SampleDone(
                            lease_id=lease.lease_id, record=Record.of(lease.ticket_id, 0, trajectory([0]))
                        )
                    ]
                )
                for count in (1, 2):  # acknowledgements of one burst would be sent as one
                    link.send(sample)
                    await until(inbox, SampleAck, count=count)
                link.send(
                    SampleFailed(
                        lease_id=lease.lease_id,
                        ticket_id=lease.ticket_id,
                        sample_index=1,
                        kind=FailureKind.REWARD,
                        num_tokens=0,
                        error="reward hung",
                    )
                )
                acks = await until(inbox, SampleAck, count=3)
                assert [(ack.sample_indices, ack.refused) for ack in acks] == [
                    ([0], ""),
                    ([0], ""),
                    ([1], ""),
                ]
                (_, again) = await until(inbox, Leases, count=2)
                assert [
                    entry.sample_indices for entry in again.leases if entry.ticket_id == lease.ticket_id
                ] == [[1]]
                await link.call(Goodbye(), timeout_s=HANG_LIMIT_S)
                link.send(beat([], free=2))
                await until(inbox, HelloRequired)
            totals = await trainer.call(GetRunCounters())
            assert totals.counters["samples_duplicate"] == 1 and totals.counters["samples_failed"] == 1
            assert totals.tickets["queued"] == totals.tickets["issued"] > 0 and totals.tickets["leased"] == 0

    asyncio.run(run())


def test_a_failed_job_sends_the_reason_to_every_peer(tmp_path: Path) -> None:
    with running_buffer(tmp_path, buffer={"max_consecutive_failures": 3, "max_sample_retries": 10}) as buffer:

        async def run() -> None:
            inbox: list[Any] = []
            async with (
                training(buffer) as trainer,
                connected(
                    buffer, hello("rollout-0", dataset=dataset_fingerprint(buffer.config)), inbox=inbox
                ) as link,
            ):
                waiting = asyncio.create_task(trainer.call(Fetch(step=0, position=0)))
                link.send(beat([], free=8))
                leases = (await until(inbox, Leases))[0].leases
                assert len(leases) >= 3
                for lease in leases:
                    for index in lease.sample_indices:
                        link.send(
                            SampleFailed(
                                lease_id=lease.lease_id,
                                ticket_id=lease.ticket_id,
                                sample_index=index,
                                kind=FailureKind.REWARD,
                                num_tokens=0,
                                error="no such verifier",
                            )
                        )
                with pytest.raises(ArealError, match="no such verifier"):
                    await waiting
                await until(inbox, JobFailed)

        asyncio.run(run())
        _, stderr = buffer.process.communicate()
        assert buffer.process.returncode == 1
        assert "3 samples failed in a row" in stderr and "Traceback" not in stderr


def test_a_server_that_fails_is_quarantined_with_a_reason(tmp_path: Path) -> None:
    with running_buffer(tmp_path, buffer={"max_consecutive_failures": 2}) as buffer:

        async def run() -> None:
            inbox: list[Any] = []
            dataset, settings = (
                dataset_fingerprint(buffer.config),
                shared_settings(buffer.config, Role.ROLLOUT),
            )
            broken = hello("rollout-0", dataset=dataset, settings=settings)
            async with training(buffer) as trainer, connected(buffer, broken, inbox=inbox) as link:
                link.send(beat([], free=8))
                leases = (await until(inbox, Leases))[0].leases
                # Not before: it could have made all samples that may be made now.
                buffer.produce("rollout-1")
                await asyncio.to_thread(buffer.wait_status, lambda status: num_serving(status) == 2)
                for lease in leases[:2]:
                    link.send(
                        SampleFailed(
                            lease_id=lease.lease_id,
                            ticket_id=lease.ticket_id,
                            sample_index=0,
                            kind=FailureKind.ENGINE,
                            num_tokens=9,
                            error="out of memory",
                        )
                    )
                await until(inbox, SampleAck, count=2)
                await link.call(beat([], free=8), timeout_s=HANG_LIMIT_S)
                (peer,) = [peer for peer in buffer.status()["peers"] if peer["name"] == "rollout-0"]
                assert "out of memory" in peer["quarantine"]["reason"]
                assert 0 < peer["quarantine"]["rest_s"] <= 30 and peer["free_samples"] == 0
                await link.call(Goodbye(), timeout_s=HANG_LIMIT_S)
                await trainer.train(0)

        asyncio.run(run())
        status = buffer.wait_status(lambda status: status["step"] == 1)
        assert status["selection"]["failures"]["engine"]["retry"] == 2
        assert status["selection"]["tokens_wasted"]["failed_engine"] == 18
        buffer.wait_series('areal_samples_failed_total{kind="engine",outcome="retry"} 2.0')
        for line in ("areal_quarantines_total 1.0", "areal_servers_quarantined 0.0"):
            buffer.wait_series(line)
        assert "rollout-0 gets no leases for 30 s: 2 samples failed in a row" in buffer.terminate()[1]


def test_a_draining_buffer_serves_its_trainer(tmp_path: Path) -> None:
    # It serves a trainer that it has heard within three heartbeats, and the one of the test sends none.
    daemon = {"heartbeat_s": 30.0, "drain_timeout_s": 2 * HANG_LIMIT_S}
    with running_buffer(tmp_path, daemon=daemon, buffer={"lease_timeout_s": HANG_LIMIT_S}) as buffer:
        check_a_draining_buffer(buffer)


def check_a_draining_buffer(buffer: BufferProcess) -> None:
    buffer.produce("rollout-0")

    async def run() -> None:
        async with training(buffer) as trainer:
            await trainer.train(0)
            buffer.process.send_signal(signal.SIGTERM)
            with pytest.raises(OSError):
                while True:  # until it is draining
                    await asyncio.to_thread(buffer.get, "/readyz")
            await trainer.train(1)
            await trainer.call(CommitStep(step=1))
            await trainer.call(Goodbye())

    asyncio.run(run())
    assert buffer.ended() == (0, "")
    assert not (buffer.paths.endpoints / "buffer.json").exists()


def test_a_port_in_use_is_a_user_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        buffer = BufferProcess(job(tmp_path, buffer={"port": taken.getsockname()[1]}), wait=False)
        try:
            _, stderr = buffer.process.communicate()
        finally:
            buffer.close()
    assert buffer.process.returncode == 2
    assert stderr.count("\n") == 1 and "buffer.port" in stderr, stderr


def test_invalid_settings_are_refused_at_the_start(tmp_path: Path) -> None:
    buffer = BufferProcess(
        job(tmp_path, sampling={"group_size": 1}, buffer={"group_filter": "spread"}), wait=False
    )
    try:
        _, stderr = buffer.process.communicate()
    finally:
        buffer.close()
    assert buffer.process.returncode == 2 and "sampling.group_size" in stderr
