"""Names, incarnations and the end of a run: a buffer process over real sockets, and an intruder."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import sqlite3
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.config.evaluation import MAX_SETS
from areal_like.errors import ConfigError, DeadlineError, RefusedError, RunFinishedError
from areal_like.shards import WHOLE
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.fingerprint import dataset_fingerprint, shared_settings
from areal_like.wire.limits import MAX_SETTINGS_CHARS
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, FinishRun, RunCounters, StartTraining
from areal_like.wire.messages.hello import Drain, Goodbye, Hello, HelloRequired, JobFinished, Role, Welcome
from areal_like.wire.messages.producer import HeartbeatAck, ReturnLeases
from buffer.ledger.recovery import recover
from buffer.service.daemon import RunEnd
from buffer.service.handlers import Handlers
from buffer.service.operations import unfence_offline
from buffer.service.outbox import Outbox
from buffer.service.peers import ConnectedPeers, PeerKeys
from buffer.service.registration import ANSWER_S, MAX_WAITING, NameClaims, Newcomer
from tests.support.buffer_harness import (
    BufferProcess,
    FakeTrainer,
    connected,
    lie_until_refused,
    running_buffer,
    trainer_hello,
    training,
    wait_for_hello_required,
)
from tests.support.fake_producer import hello
from tests.support.ledger_simulation import heartbeat, ledger_settings, new_ledger
from tests.support.row_store import RowStore
from tests.support.store_load import raising
from tests.support.waiting import HANG_LIMIT_S

HUGE = (1 << 63) - 1


def server_hello(buffer: BufferProcess, name: str = "rollout-0", **changes: Any) -> Hello:
    return hello(name, dataset=dataset_fingerprint(buffer.config), **changes)


def scalar(buffer: BufferProcess, name: str) -> int:
    """A scalar of the ledger on disk."""
    file = buffer.paths.ledger / "ledger.sqlite3"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=600)) as connection:
        row = connection.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 0


def control(buffer: BufferProcess, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a control request; also to one that is refused."""
    request = urllib.request.Request(
        f"http://{buffer.http}/control/{verb}", data=json.dumps(body).encode(), method="POST"
    )
    try:
        with urllib.request.urlopen(request) as response:
            return dict(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        return dict(json.loads(error.read()))


async def wait_for(inbox: list[Any], message: Any) -> None:
    async with asyncio.timeout(HANG_LIMIT_S):
        while message not in inbox:
            await asyncio.sleep(0.01)


async def finish(trainer: FakeTrainer) -> None:
    """Trains all steps and ends the run."""
    num_steps = trainer.config.trainer.num_steps
    for step in range(num_steps):
        await trainer.train(step)
        await trainer.call(AllocVersion(step=step + 1))
    await trainer.call(CommitStep(step=num_steps - 1))
    await trainer.call(FinishRun())


# --- who has a name ---


def test_a_forged_hello_displaces_nobody(tmp_path: Path) -> None:
    """A stranger without keys says hello as trainer-0 and rollout-0, with the largest number."""
    with running_buffer(tmp_path) as buffer:
        config = buffer.config
        producer = buffer.produce("rollout-0")

        async def run() -> None:
            async with training(buffer) as trainer, connected(buffer) as stranger:
                for step, incarnation in enumerate((0, HUGE, 0, HUGE)):
                    attacks = [
                        trainer_hello(config, incarnation=incarnation),
                        trainer_hello(config, incarnation=incarnation, name="trainer-77", rank=77),
                        server_hello(buffer, incarnation=incarnation),
                    ]
                    refused = await asyncio.gather(
                        *(stranger.call(attack, timeout_s=HANG_LIMIT_S) for attack in attacks[:1]),
                        trainer.train(step),
                        return_exceptions=True,
                    )
                    assert isinstance(refused[0], RefusedError) and "responds under it" in str(refused[0])
                    for attack in attacks[1:]:
                        async with connected(buffer) as other:
                            with pytest.raises(RefusedError, match="responds under it"):
                                await other.call(attack, timeout_s=HANG_LIMIT_S)
                    await trainer.call(AllocVersion(step=step + 1))
                for step in (4, 5):
                    await trainer.train(step)
                    await trainer.call(AllocVersion(step=step + 1))

        asyncio.run(run())
        assert producer.poll() is None and buffer.status()["counters"]["leases_lost"] == 0
        assert scalar(buffer, "incarnation:trainer") == scalar(buffer, "incarnation:rollout-0") == 1


def test_a_process_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    """The successor needs no clock: its number comes from the ledger."""
    with running_buffer(tmp_path) as buffer:

        async def run() -> None:
            old_hello, inbox = server_hello(buffer), []
            async with connected(buffer, old_hello, inbox=inbox, answers=False) as old:
                started_s = time.monotonic()
                async with connected(buffer) as link:
                    welcome = await link.call(server_hello(buffer), timeout_s=HANG_LIMIT_S)
                    assert welcome.incarnation == 2
                    assert time.monotonic() - started_s >= ANSWER_S
                    old.send(Goodbye())
                    await wait_for(inbox, HelloRequired())
                    with pytest.raises(RefusedError, match=r"\(incarnation\).*was replaced"):
                        await old.call(dataclasses.replace(old_hello, incarnation=1), timeout_s=HANG_LIMIT_S)

        asyncio.run(run())


def test_a_dead_process_is_replaced_at_once(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:

        async def run() -> list[int]:
            granted, times_s = [], []
            for make in (server_hello, lambda _: trainer_hello(buffer.config)):
                for _ in range(3):
                    async with connected(buffer) as link:
                        started_s = time.monotonic()
                        granted.append((await link.call(make(buffer), timeout_s=HANG_LIMIT_S)).incarnation)
                        times_s.append(time.monotonic() - started_s)
                    await asyncio.sleep(0.1)
            # Of those that replace another; a busy machine may be slow now and then.
            assert min(times_s[1:3] + times_s[4:]) < ANSWER_S
            return granted

        assert asyncio.run(run()) == [1, 2, 3, 1, 2, 3]
    restarted = BufferProcess(buffer.config)
    try:

        async def again() -> Welcome:
            async with connected(restarted) as link:
                reply: Welcome = await link.call(
                    server_hello(restarted, incarnation=HUGE), timeout_s=HANG_LIMIT_S
                )
                return reply

        assert asyncio.run(again()).incarnation == 4, "a restarted buffer counts on"
    finally:
        restarted.close()


def test_unfence_gives_the_name_to_the_next_process(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:

        async def run() -> None:
            inbox: list[Any] = []
            async with connected(buffer, server_hello(buffer), inbox=inbox) as old:
                async with connected(buffer) as link:
                    with pytest.raises(RefusedError, match="areal-like unfence job rollout-0"):
                        await link.call(server_hello(buffer), timeout_s=HANG_LIMIT_S)
                    reply = await asyncio.to_thread(control, buffer, "unfence", {"name": "rollout-0"})
                    assert reply == {"unfenced": "rollout-0", "change": "incarnation 1 -> 2"}
                    assert (await link.call(server_hello(buffer), timeout_s=HANG_LIMIT_S)).incarnation == 3
                old.send(Goodbye())
                await wait_for(inbox, HelloRequired())
            for name, error in (("rollout-9", "no process of this run"), ("../x", "want {")):
                refusal = await asyncio.to_thread(control, buffer, "unfence", {"name": name})
                assert error in refusal["error"]

        asyncio.run(run())
        config = buffer.config
    unfence_offline(config, "rollout-0", WHOLE)
    with pytest.raises(ConfigError, match="no process of this run"):
        unfence_offline(config, "rollout-9", WHOLE)
    file = buffer.paths.ledger / "ledger.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute(
            "SELECT verb, subject, detail, unix_s FROM operations ORDER BY id"
        ).fetchall()
    assert [row[:3] for row in rows] == [
        ("unfence", "rollout-0", "incarnation 1 -> 2"),
        ("unfence", "rollout-0", "incarnation 3 -> 4"),
    ]
    assert all(abs(row[3] - time.time()) < 600 for row in rows)


def test_a_refused_server_says_hello_again(tmp_path: Path) -> None:
    """Also on a second connection, and it goes on sending messages on both. The job goes on."""
    with running_buffer(tmp_path) as buffer:
        buffer.produce("rollout-0")

        async def run() -> None:
            inboxes: list[list[Any]] = [[], []]
            again = server_hello(buffer, "liar")
            async with (
                training(buffer) as trainer,
                connected(buffer, again, inbox=inboxes[0]) as first,
                connected(buffer, inbox=inboxes[1]) as second,
            ):
                assert "refused for good" in await lie_until_refused(first)
                for link, inbox in zip((first, second), inboxes, strict=True):
                    with pytest.raises(RefusedError, match=r"\(conduct\)"):
                        await link.call(again, timeout_s=HANG_LIMIT_S)
                    for message in (heartbeat(), ReturnLeases(leases=[1], reason=""), Goodbye()):
                        inbox.clear()
                        link.send(message)
                        await wait_for_hello_required(inbox)
                for step in range(3):
                    await trainer.train(step)
                    await trainer.call(AllocVersion(step=step + 1))

        asyncio.run(run())
        assert "liar" not in [peer["name"] for peer in buffer.status()["peers"]]


@pytest.mark.parametrize("message", [heartbeat(), ReturnLeases(leases=[1], reason=""), Goodbye()])
def test_a_server_without_an_entry_registers_again(message: Any) -> None:
    """Whatever removed its entry in the ledger: its messages must not end the job."""

    async def run() -> None:
        ledger, peers = new_ledger(), ConnectedPeers(job="job", dataset="d")
        listener = Listener(host="127.0.0.1", port=0, handler=lambda _: None, max_message_bytes=1 << 20)
        outbox = Outbox(ledger, peers, listener, on_error=raising)
        handlers = Handlers(
            ledger,
            peers,
            outbox,
            job="job",
            clock=lambda: 0.0,
            run_counters=lambda: RunCounters(tickets={}, drops={}, counters={}),
            on_finished=lambda: None,
            keys=PeerKeys(None),
        )

        def take(message: Any) -> Any:
            return handlers.handle(Envelope(peer=b"route", rid=1, message=message, num_bytes=0))

        try:
            process = hello("rollout-0", num_train_prompts=1000)
            take(process)
            assert isinstance(take(heartbeat()), HeartbeatAck)
            ledger.dispatcher.remove_server("rollout-0")
            outbox.flush(now_s=0.0)
            assert take(message) is None and handlers.num_unregistered_frames == 1
            assert not handlers.may_send(b"route", type(message))
            take(process)
            assert isinstance(take(heartbeat()), HeartbeatAck)
        finally:
            listener.close()

    asyncio.run(run())


def test_a_change_is_logged_before_it_is_durable(tmp_path: Path) -> None:
    """Another program has locked the ledger: the changes take effect, and the requests wait."""
    with ThreadPoolExecutor() as pool, running_buffer(tmp_path, max_staleness=2) as buffer:
        file = buffer.paths.ledger / "ledger.sqlite3"
        with closing(sqlite3.connect(file, isolation_level=None, timeout=HANG_LIMIT_S)) as other:
            other.execute("BEGIN IMMEDIATE")
            pause = pool.submit(control, buffer, "pause", {})
            change = pool.submit(control, buffer, "set", {"max_staleness": 1})
            buffer.wait_status(lambda status: status["paused"] and status["max_staleness"] == 1)
            log = (buffer.paths.logs / "buffer.log").read_text()
            assert "an operator pauses the run" in log
            assert "an operator sets max_staleness=1, step 0" in log
            assert not pause.done() and not change.done()
            other.execute("ROLLBACK")
            assert pause.result() == {"paused": True, "changed": True}
            assert change.result()["changes"][0]["value"] == "1"


# --- what a hello may contain ---


def test_a_stranger_learns_no_values(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:
        right = trainer_hello(buffer.config, settings="sampling.seed=1")

        async def run() -> list[str]:
            refusals = []
            server = dataclasses.replace(server_hello(buffer), dtype="bfloat16")
            async with connected(buffer, server), connected(buffer) as link:
                for field in ("job", "dataset", "model", "tokenizer", "dtype", "settings"):
                    with pytest.raises(RefusedError) as refused:
                        await link.call(
                            dataclasses.replace(right, **{field: "guess"}), timeout_s=HANG_LIMIT_S
                        )
                    assert refused.value.field == field
                    refusals.append(str(refused.value))
            return refusals

        text = "\n".join(asyncio.run(run()))
        assert text.count("differs from the job's") == 6
        assert dataset_fingerprint(buffer.config) not in text
        assert "trainer.groups_per_step" in text and "groups_per_step=" not in text, "names of settings alone"
        log = (buffer.paths.logs / "buffer.log").read_text()
        assert dataset_fingerprint(buffer.config) in log and "groups_per_step" in log


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "a/../b"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "trainer-1"}, "name"),
        ({"process": "1"}, "process"),
        ({"device": "d" * 100}, "device"),
        ({"incarnation": -1}, "incarnation"),
        ({"http_address": "10.0.0.1:80"}, "http_address"),
        ({"weights_address": "tcp://example.org:80"}, "weights_address"),
        ({"weights_address": "tcp://127.0.0.1.example.org:80"}, "weights_address"),
        ({"weights_address": "ipc://127.0.0.1:80"}, "weights_address"),
        ({"weights_address": "tcp://127.0.0.1:0;127.0.0.1:80"}, "weights_address"),
    ],
)
def test_a_hello_outside_the_limits_is_refused(
    module_buffer: BufferProcess, changes: dict[str, Any], field: str
) -> None:
    async def run() -> None:
        async with connected(module_buffer) as link:
            with pytest.raises(RefusedError) as refused:
                await link.call(
                    dataclasses.replace(server_hello(module_buffer), **changes), timeout_s=HANG_LIMIT_S
                )
            assert refused.value.field == field
            for address in ("tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://localhost:80", "tcp://0.0.0.0:80"):
                allowed = dataclasses.replace(server_hello(module_buffer), weights_address=address)
                assert isinstance(await link.call(allowed, timeout_s=HANG_LIMIT_S), Welcome)
                await link.call(Goodbye(), timeout_s=HANG_LIMIT_S)
            await link.call(server_hello(module_buffer, "rollout-7"), timeout_s=HANG_LIMIT_S)
            with pytest.raises(RefusedError, match="stats"):
                await link.call(Goodbye(stats={"k" * 65: 1.0}), timeout_s=HANG_LIMIT_S)
            await link.call(Goodbye(), timeout_s=HANG_LIMIT_S)

    asyncio.run(run())


@pytest.fixture(scope="module")
def module_buffer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running_buffer(tmp_path_factory.mktemp("limits")) as process:
        yield process


def test_long_names_grow_neither_log_nor_directory(tmp_path: Path) -> None:
    """A stranger without keys: names of 3 MB, and more peers than are allowed."""
    with running_buffer(tmp_path, buffer={"max_peers": 4}) as buffer:
        buffer.produce("rollout-0")
        buffer.wait_status(lambda status: status["peers"])
        log = buffer.paths.logs / "buffer.log"

        async def run() -> None:
            async with (
                training(buffer) as trainer,
                connected(buffer) as muted,
                connected(buffer) as stranger,
            ):
                size = log.stat().st_size
                for number in range(20):
                    long = server_hello(buffer, f"{number}{'x' * 3_000_000}")
                    with pytest.raises((RefusedError, DeadlineError, ValueError)):
                        await muted.call(long, timeout_s=0.1)
                refusals = 0
                for number in range(300):
                    try:
                        await stranger.call(server_hello(buffer, f"x-{number}"), timeout_s=HANG_LIMIT_S)
                    except RefusedError as error:
                        assert error.field == "peers"
                        refusals += 1
                assert refusals > 290
                assert log.stat().st_size - size < 1 << 16
                for step in range(3):
                    await trainer.train(step)
                    await trainer.call(AllocVersion(step=step + 1))

        asyncio.run(run())
        assert len(buffer.status()["peers"]) <= 4


# --- the end of a run ---


def test_every_peer_is_told_that_the_run_is_finished(tmp_path: Path) -> None:
    with running_buffer(tmp_path, trainer={"num_steps": 2, "groups_per_step": 2}) as buffer:
        producer = buffer.produce("rollout-0")

        async def run() -> None:
            inbox: list[Any] = []
            async with (
                connected(buffer, server_hello(buffer, "rollout-1"), inbox=inbox) as idle,
                training(buffer) as trainer,
            ):
                with pytest.raises(RefusedError, match="cannot finish the run"):
                    await trainer.call(FinishRun())
                await finish(trainer)
                await wait_for(inbox, JobFinished())
                inbox.clear()
                await wait_for(inbox, JobFinished())  # told again, because it has not left
                async with connected(buffer) as late:
                    with pytest.raises(RunFinishedError):
                        await late.call(server_hello(buffer, "rollout-2"), timeout_s=HANG_LIMIT_S)
                await idle.call(Goodbye(), timeout_s=HANG_LIMIT_S)
                await trainer.call(Goodbye())

        asyncio.run(run())
        assert producer.wait() == 0
        assert buffer.ended() == (0, "")
        assert scalar(buffer, "finished_steps") == 2


def test_a_finished_run_is_continued_with_more_steps(tmp_path: Path) -> None:
    steps = {"num_steps": 1, "groups_per_step": 2}
    daemon = {"heartbeat_s": 0.1, "linger_s": 0.5, "exit_code_on_drain": 75}
    with running_buffer(tmp_path, trainer=steps, daemon=daemon) as buffer:
        buffer.produce("rollout-0")

        async def run() -> None:
            async with training(buffer) as trainer:
                await finish(trainer)

        asyncio.run(run())
        buffer.process.communicate()  # after linger_s: two peers have left without a goodbye
        assert buffer.process.returncode == 0
    # It would end by itself after linger_s, too.
    longer = dataclasses.replace(buffer.config.daemon, linger_s=HANG_LIMIT_S)
    again = BufferProcess(dataclasses.replace(buffer.config, daemon=longer))
    try:

        async def arrive_late() -> None:
            async with connected(again) as link:
                with pytest.raises(RunFinishedError):
                    await link.call(server_hello(again), timeout_s=HANG_LIMIT_S)
                await link.call(trainer_hello(again.config), timeout_s=HANG_LIMIT_S)
                with pytest.raises(RunFinishedError):
                    await link.call(StartTraining(step=1), timeout_s=HANG_LIMIT_S)

        asyncio.run(arrive_late())
        assert again.terminate() == (0, ""), "it has nothing to drain"
    finally:
        again.close()
    more = dataclasses.replace(buffer.config, trainer=dataclasses.replace(buffer.config.trainer, num_steps=2))
    continued = BufferProcess(more)
    try:

        async def go_on() -> None:
            async with connected(continued) as link, connected(continued) as server:
                await server.call(server_hello(continued), timeout_s=HANG_LIMIT_S)
                await link.call(trainer_hello(more), timeout_s=HANG_LIMIT_S)
                await link.call(StartTraining(step=1), timeout_s=HANG_LIMIT_S)

        asyncio.run(go_on())
        code, stderr = continued.terminate()
        assert (code, stderr) == (75, ""), "it has drained, and the run is not finished"
    finally:
        continued.close()


def test_an_operator_drains_a_server_through_the_buffer(tmp_path: Path) -> None:
    with running_buffer(tmp_path) as buffer:

        async def run() -> None:
            inbox: list[Any] = []
            async with connected(buffer, server_hello(buffer), inbox=inbox):
                reply = await asyncio.to_thread(control, buffer, "drain_server", {"server": "rollout-0"})
                assert reply == {"draining": "rollout-0"}
                await wait_for(inbox, Drain())
            for name in ("rollout-9", None, ["rollout-0"]):
                reply = await asyncio.to_thread(control, buffer, "drain_server", {"server": name})
                assert "registered rollout server" in reply["error"]

        asyncio.run(run())


# --- ledgers of the release before ---


def old_ledger(**scalars: int) -> RowStore:
    """A ledger with these scalars, in which tickets were issued and which has no generation."""
    store = RowStore()
    ledger = new_ledger(store=store)
    name = "a"
    ledger.dispatcher.register_server(name, incarnation=1, weights_version=0, now_s=0.0)
    ledger.dispatcher.heartbeat(name, heartbeat(free=4), now_s=0.0)
    assert ledger.dispatcher.grant(now_s=0.0)["a"]
    for key, value in scalars.items():
        store.put_scalar(key.replace("__", ":"), value)
    copy = store.copy()
    copy.connection.execute("DELETE FROM marks WHERE name = 'generation'")
    return copy


def test_numbers_of_the_release_before_are_the_newest() -> None:
    clock = time.time_ns()
    store = old_ledger(**{"incarnation__trainer-0": clock, "incarnation__rollout-0": clock + 5})
    ledger = recover(ledger_settings(durable=True), store, now_s=0.0)
    assert ledger.admit_process("trainer", "p") == clock + 1
    assert ledger.admit_process("rollout-0", "q") == clock + 6
    assert ledger.state.leases._next_id > int(time.time()) << 20
    again = recover(ledger_settings(durable=True), store.copy(), now_s=0.0)
    assert again.state.leases._next_id > ledger.state.leases._next_id + (1 << 30)
    assert again.state.incarnations.find("rollout-0", "q", 0) == clock + 6


def test_an_impossible_number_needs_unfence() -> None:
    store = old_ledger(**{"incarnation__trainer-0": HUGE, "trainer_incarnation": HUGE})
    ledger = recover(ledger_settings(durable=True), store, now_s=0.0)
    with pytest.raises(RefusedError, match="areal-like unfence RUN trainer"):
        ledger.admit_process("trainer", "p")
    ledger.operator.unfence("trainer", unix_s=1.0)
    assert 0 < ledger.admit_process("trainer", "p") < 10
    assert ledger.state.trainer_incarnation < 10
    ledger.trainer.start_training(
        incarnation=ledger.state.incarnations.find("trainer", "p", 0), step=0, stream={}
    )


# --- the decisions alone ---


def test_buffer_of_a_finished_run_waits_for_late_peers() -> None:
    peers = ConnectedPeers(job="job", dataset="d")
    restarted = RunEnd(peers, linger_s=30.0, was_finished=True)
    assert [restarted.has_ended(now_s=now_s) for now_s in (5.0, 34.9, 35.0)] == [False, False, True]
    end = RunEnd(peers, linger_s=30.0, was_finished=False)
    assert end.has_ended(now_s=5.0), "every peer has left"
    end = RunEnd(peers, linger_s=30.0, was_finished=False)
    end.lost("rollout-0", now_s=1.0)
    assert [end.has_ended(now_s=now_s) for now_s in (5.0, 30.9, 31.0)] == [False, False, True]
    peers.add(b"route", hello("rollout-1"), now_s=5.0)
    end = RunEnd(peers, linger_s=30.0, was_finished=False)
    assert [end.has_ended(now_s=now_s) for now_s in (5.0, 34.9, 35.0)] == [False, False, True]


def newcomer(route: bytes) -> Newcomer:
    return Newcomer(route=route, rid=1, hello=hello("rollout-0"))


def test_the_holder_of_a_name_keeps_it_by_any_message() -> None:
    claims = NameClaims()
    claims.begin("rollout-0", [b"holder"], now_s=0.0)
    assert claims.is_asked("rollout-0") and claims.wait("rollout-0", newcomer(b"new"))
    assert claims.wait("rollout-0", newcomer(b"new")), "a repeated hello takes no second place"
    assert list(claims.heard(b"other")) == [] == list(claims.expired(now_s=ANSWER_S - 0.1))
    assert [each.route for each in claims.heard(b"holder")] == [b"new"]
    assert not claims.is_asked("rollout-0") and list(claims.expired(now_s=100.0)) == []


def test_a_silent_holder_loses_its_name() -> None:
    claims = NameClaims()
    claims.begin("trainer", [b"rank 0", b"rank 1"], now_s=0.0)
    routes = [secrets.token_bytes(4) for _ in range(MAX_WAITING)]
    assert all(claims.wait("trainer", newcomer(route)) for route in routes)
    assert not claims.wait("trainer", newcomer(b"one too many"))
    ((name, newcomers),) = claims.expired(now_s=ANSWER_S)
    assert name == "trainer" and [each.route for each in newcomers] == routes
    assert claims.cancel("trainer") == []


def test_a_refusal_names_the_settings_that_differ_and_no_values() -> None:
    settings = {Role.ROLLOUT: "sampling.temperature=1.0 eval.sets.a=0f model.chat_template_kwargs={}"}
    peers = ConnectedPeers(job="secret-job", dataset="d", settings=settings)
    with pytest.raises(RefusedError) as refused:
        peers.check(hello("rollout-0", job="mine"))
    assert refused.value.args[0] == "job" and "secret-job" not in str(refused.value)
    theirs = "sampling.temperature=0.5 eval.sets.a=0f model.chat_template_kwargs={x: model.y=1 0}"
    with pytest.raises(RefusedError) as refused:
        peers.check(hello("rollout-0", job="secret-job", settings=theirs))
    reason = str(refused.value)
    assert "in sampling.temperature, model.chat_template_kwargs;" in reason
    assert "1.0" not in reason and "0.5" not in reason


def test_long_settings_fit_into_a_hello_and_differ() -> None:
    def shared(first: int) -> str:
        teachers = {"default": [f"http://10.0.0.{first + number}:30000" for number in range(200)]}
        sets = {f"{number}{'n' * 30}": {"num_samples": 1} for number in range(MAX_SETS)}
        settings = {"distill": {"teachers": teachers}, "eval": {"sets": sets, "num_prompts": 1}}
        return shared_settings(from_mapping(settings), Role.ROLLOUT)

    ours, theirs = shared(0), shared(1)
    assert max(len(ours), len(theirs)) <= MAX_SETTINGS_CHARS
    peers = ConnectedPeers(job="j", dataset="d", settings={Role.ROLLOUT: ours})
    with pytest.raises(RefusedError, match=r"in distill\.teachers;"):
        peers.check(hello("rollout-0", job="j", settings=theirs))
