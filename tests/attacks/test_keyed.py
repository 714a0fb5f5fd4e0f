"""Attacks on a job with keys: by strangers, and by holders of a key that is not meant for what they do."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from areal_like.failures import FailureKind
from areal_like.security.administration import add_key
from areal_like.security.keys import Identity, KeyRole
from areal_like.wire.codec import encode
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, CompleteStep, StartTraining
from areal_like.wire.messages.hello import Goodbye, HelloRequired, Refused, Welcome
from areal_like.wire.messages.producer import ReturnLeases
from tests.attacks.attacker import (
    HUGE,
    Attacker,
    Tap,
    Trap,
    bytes_accepted,
    exchange,
    failure,
    forged_push,
    forged_samples,
    heartbeat,
    large_messages,
    rank_hello,
    request,
    server_hello,
    with_long_name,
)
from tests.attacks.job import AttackedJob, attacked_job
from tests.support.keys import new_keys
from tests.support.launching import TEST_LIMIT_S

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
CURVE_GREETING = 64
"""Bytes that a ZeroMQ server sends to everyone: version and mechanism."""
CURVE_WELCOME = 2 + 168
"""Bytes of its answer to the first message of a CURVE client, which anyone can send."""
CURVE_ERROR = 32
"""At most: why a handshake has failed."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, cache: dict[str, str]) -> Iterator[AttackedJob]:
    """A job with keys, among them one for a second machine, `gpu-7`."""
    directory = tmp_path_factory.mktemp("keyed")
    keys = new_keys(directory / "keys")
    add_key(keys, "gpu-7", KeyRole.ROLLOUT)
    with attacked_job(directory, f"security.keys={keys}", cache=cache, keys=keys) as job:
        yield job


def frames_of(*messages: Any) -> list[list[bytes]]:
    return [encode(message, rid=number) for number, message in enumerate(messages, start=1)]


def guesses(job: AttackedJob) -> list[list[bytes]]:
    """2: hellos that each have one wrong value."""
    right = server_hello(job.config, "rollout-5")
    fields = ("job", "model", "tokenizer", "dataset", "settings")
    return frames_of(*(server_hello(job.config, right.name, **{field: "guess"}) for field in fields))


def as_trainer(job: AttackedJob) -> list[list[bytes]]:
    """4, 7: hellos of trainers, and what a trainer may do."""
    step = job.status()["step"]
    return frames_of(
        rank_hello(job.config, "trainer-77", rank=77),
        rank_hello(job.config, incarnation=HUGE),
        StartTraining(step=0),
        AllocVersion(step=step + 1),
        CompleteStep(step=step),
        CommitStep(step=step),
    )


def as_server(job: AttackedJob) -> list[list[bytes]]:
    """3, 5, 6, 8: hellos of servers, forged samples and failures."""
    failures = [failure(lease_id=n, ticket_id=n, kind=FailureKind.REWARD) for n in range(20)]
    return frames_of(
        server_hello(job.config, "rollout-5", weights_address="tcp://127.0.0.1:9"),
        server_hello(job.config, "rollout-0", incarnation=HUGE),
        forged_samples(),
        *failures,
        Goodbye(),
    )


def long_names(job: AttackedJob) -> list[list[bytes]]:
    """9."""
    return [with_long_name(server_hello(job.config, "x"), num_chars=3_000_000)] * 10


def large(job: AttackedJob) -> list[list[bytes]]:
    """1."""
    return list(large_messages(140))


Attack = Callable[[AttackedJob], list[list[bytes]]]


@pytest.mark.parametrize("attack", [guesses, as_trainer, as_server, long_names, large])
def test_strangers_are_not_even_answered(job: AttackedJob, attack: Attack) -> None:
    public, secret = zmq.curve_keypair()
    unknown = Identity(
        name="unknown", role=KeyRole.ROLLOUT, public=public.decode(), secret=secret.decode(), token=""
    )
    before, log_bytes = job.status()["refused_handshakes"], job.log_bytes()
    server_key = job.identity("buffer").public
    with (
        Attacker(job.buffer) as without_key,
        Attacker(job.buffer, identity=unknown, server_key=server_key) as with_unknown_key,
        job.thief("operator") as operator,
        job.thief("monitor") as monitor,
    ):
        attackers = [without_key, with_unknown_key, operator, monitor]
        for attacker in attackers:
            for frames in attack(job):
                attacker.send_frames(frames)
        job.wait_status(lambda status: status["refused_handshakes"] >= before + 4, what="refused handshakes")
        assert [attacker.received(wait_s=0.1) for attacker in attackers] == [[]] * 4
    status = job.status()
    assert sorted(peer["name"] for peer in status["peers"]) == ["rollout-0", "trainer-0"]
    assert status["bad_frames"] == status["unregistered_frames"] == 0, "nothing of it was read"
    job.goes_on()
    assert job.log_bytes() - log_bytes < 1 << 20


def test_a_servers_key_is_no_trainers(job: AttackedJob) -> None:
    """4, 7: with the values that everything else would be right with."""
    before = job.status()["refused_frames"]
    with job.thief("rollout") as thief:
        for name, rank in (("trainer-0", 0), ("trainer-77", 77)):
            answer = thief.call(rank_hello(job.config, name, rank=rank, incarnation=HUGE))
            assert isinstance(answer, Refused) and answer.field == "key role"
        assert isinstance(thief.call(StartTraining(step=0), timeout_s=1), type(None))
        assert thief.inbox == [HelloRequired()]
    assert job.status()["refused_frames"] == before + 2
    job.goes_on()


def test_a_trainers_key_is_no_servers(job: AttackedJob) -> None:
    """3, 5, 6: hello as a server, forged samples and failures."""
    before = job.status()
    with job.thief("trainer") as thief:
        answer = thief.call(server_hello(job.config, "rollout-5"))
        assert isinstance(answer, Refused) and answer.field == "key role"
        thief.send(forged_samples())
        for number in range(20):
            thief.send(failure(ticket_id=number, kind=FailureKind.REWARD))
        assert set(map(type, thief.received(wait_s=0.5))) == {HelloRequired}
        # As a trainer it would be one of two, and the first one answers.
        answer = thief.call(rank_hello(job.config))
        assert isinstance(answer, Refused) and answer.field == "name"
    status = job.status()
    assert status["refused_frames"] == before["refused_frames"] + 1
    assert status["unregistered_frames"] == before["unregistered_frames"] + 21
    assert status["counters"]["samples_failed"] == before["counters"]["samples_failed"]
    job.goes_on()


def test_a_name_stays_with_its_key_and_process(job: AttackedJob) -> None:
    """8: another machine's key, and a copy of the server's own."""
    for key, field in (("gpu-7", "key name"), ("rollout", "name")):
        with job.thief(key) as thief:
            answer = thief.call(server_hello(job.config, "rollout-0", incarnation=HUGE))
            assert isinstance(answer, Refused) and answer.field == field
    job.goes_on()
    assert job.status("rollout-0")["leases"] is not None


def test_refusals_hold_no_values(job: AttackedJob) -> None:
    """2: also for the holder of a key."""
    with job.thief("gpu-7") as thief:
        for field in ("job", "model", "tokenizer", "dataset", "settings"):
            answer = thief.call(server_hello(job.config, "rollout-5", **{field: "guess"}))
            assert isinstance(answer, Refused) and answer.field == field
            right = getattr(server_hello(job.config, "rollout-5"), field)
            assert right not in answer.reason.replace("the job's", "")
    job.goes_on()


def test_a_server_gets_weights_only_with_its_key(job: AttackedJob) -> None:
    """3: the holder of a key gives the address of a machine that does not have it."""
    with Trap() as weights, Trap() as pages, job.thief("gpu-7") as thief:
        hello = server_hello(
            job.config,
            "rollout-5",
            weights_address=f"tcp://127.0.0.1:{weights.port}",
            http_address=f"127.0.0.1:{pages.port}",
        )
        welcome = thief.call(hello)
        assert isinstance(welcome, Welcome)
        thief.send(heartbeat(free=0, version=welcome.newest_version))
        job.wait_status(lambda _: weights.heard, what="a connection of the trainer")
        job.goes_on(num_steps=5)
        thief.send(heartbeat(free=0, version=welcome.newest_version))
        status, answer = request(
            job.planes["buffer"],
            "POST",
            "/control/drain_server",
            body=b'{"server": "rollout-5"}',
            headers=job.operator(),
        )
        assert (status, answer) == (200, b'{"draining":"rollout-5"}')
        thief.received(wait_s=1.0)
        thief.call(Goodbye())
        # A greeting and the first message of a handshake, which has keys of this connection alone.
        assert all(len(heard) <= CURVE_GREETING + 2 + 200 for heard in weights.heard)
        assert pages.heard == [], "an operator's request went to an address that a peer has given"
    job.goes_on()


@pytest.mark.parametrize("key", ["", "rollout", "gpu-7", "buffer", "operator"])
def test_only_a_trainer_may_push_weights(job: AttackedJob, key: str) -> None:
    """10: also for the holder of the buffer's key."""
    rollout = job.identity("rollout").public
    identity = job.identity(key) if key else None
    with Trap() as store, Attacker(job.weights, identity=identity, server_key=rollout) as attacker:
        for frames in [*frames_of(*forged_push(store.port)), *large_messages(8)]:
            attacker.send_frames(frames)
        assert attacker.received(wait_s=1.0) == []
        assert store.heard == [], "the engine connects nowhere"
    job.goes_on()
    assert "forged" not in (job.run / "logs" / "rollout-0.log").read_text()


def test_the_holder_of_a_key_may_send_rubbish(job: AttackedJob) -> None:
    """1, 9: what a stolen key can still send."""
    before = job.status()["bad_frames"]
    with job.thief("gpu-7") as thief:
        for frames in [*large_messages(20), *long_names(job)]:
            thief.send_frames(frames)
    job.wait_status(lambda status: status["bad_frames"] > before, what="bad frames")
    job.goes_on()


def test_replayed_connections_are_refused(job: AttackedJob) -> None:
    port = int(job.buffer.rpartition(":")[2])
    hello = server_hello(job.config, "rollout-6")
    with Tap(port) as tap:
        with job.thief("gpu-7", tap.address) as peer:
            assert isinstance(peer.call(hello), Welcome)
            assert isinstance(peer.call(Goodbye()), object)
        recorded = tap.sent
    assert len(recorded) > 500 and b"rollout-6" not in recorded
    before = job.status()["refused_handshakes"]
    answer = exchange(port, recorded, wait_s=2.0)
    assert len(answer) <= CURVE_GREETING + CURVE_WELCOME + CURVE_ERROR
    status = job.wait_status(lambda status: status["refused_handshakes"] > before, what="a refused handshake")
    assert all(peer["name"] != "rollout-6" for peer in status["peers"])
    job.goes_on()


def test_frames_sent_again_with_another_key(job: AttackedJob) -> None:
    """A frame that was valid, from the same route, with the other key of the same role."""
    route = secrets.token_bytes(16)
    frames = encode(ReturnLeases(leases=[1], reason="leaving"))
    with job.thief("gpu-7", route=route) as peer:
        assert isinstance(peer.call(server_hello(job.config, "rollout-6")), Welcome)
        peer.send_frames(frames)
        before = job.status()["refused_frames"]
        with job.thief("rollout", route=route) as thief:
            thief.send_frames(frames)
            (answer,) = thief.received(wait_s=2.0)
            assert isinstance(answer, Refused) and answer.field == "key"
    job.wait_status(lambda status: status["refused_frames"] == before + 1, what="a refused frame")
    job.goes_on()


@pytest.mark.parametrize("token", ["", "rollout", "operator"])
def test_nobody_else_uses_the_engine(job: AttackedJob, token: str, tmp_path: Path) -> None:
    """11 to 14: the engine's key is known to its server alone."""
    headers = {"Authorization": f"Bearer {job.identity(token).token}"} if token else {}
    for path, body in engine_requests(tmp_path).items():
        assert request(job.engine, "POST", path, body=body, headers=headers)[0] == 401
    for path in ("/health", "/get_server_info", "/get_model_info", "/metrics", "/livez"):
        assert request(job.engine, "GET", path, headers=headers)[0] == 401
    job.goes_on()


def engine_requests(directory: Path) -> dict[str, bytes]:
    """11 to 14: paths and bodies."""
    return {
        "/update_weights_from_disk": f'{{"model_path": "{directory}"}}'.encode(),
        "/pause_generation": b"{}",
        "/init_weights_update_group": b'{"master_address": "10.0.0.1", "master_port": 9, "rank_offset": 1, '
        b'"world_size": 2, "group_name": "g", "backend": "gloo"}',
        "/generate": b'{"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4}}',
        "/destroy_weights_update_group": b"{}",
        "/flush_cache": b"{}",
    }


def test_pages_need_a_token_and_no_web_page_may_ask(job: AttackedJob) -> None:
    """16 to 18, for every daemon."""
    for name, address in job.planes.items():
        for path in ("/status", "/metrics", "/metrics/engine", "/control/drain"):
            for headers in ({}, {"Authorization": "Bearer x"}):
                assert request(address, "GET", path, headers=headers)[0] == 401
                assert request(address, "POST", path, body=b"{}", headers=headers)[0] == 401
        server = {"Authorization": f"Bearer {job.identity('rollout').token}"}
        assert request(address, "POST", "/control/drain", body=b"{}", headers=server)[0] == 403
        page = job.operator() | {"Origin": "http://evil.example"}
        assert request(address, "POST", "/control/drain", body=b"{}", headers=page)[0] == 403
        rebound = job.operator() | {"Host": "evil.example"}
        assert request(address, "GET", "/status", headers=rebound)[0] == 421
        before = job.peak_bytes(name)
        for chunked in (False, True):
            for headers in ({}, job.operator()):
                num_bytes = bytes_accepted(
                    address, "/control/drop", num_bytes=300_000_000, chunked=chunked, headers=headers
                )
                assert num_bytes < 20 << 20
        assert job.peak_bytes(name) - before < 32 << 20
    job.goes_on()
