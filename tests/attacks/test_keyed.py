"""Attacks on a job with keys: by strangers, and by holders of a key that is not meant for what they do."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import zmq

from areal_like.config import Config
from areal_like.failures import FailureKind
from areal_like.security.administration import add_key
from areal_like.security.keys import Identity, KeyRole
from areal_like.wire.messages.consumer import StartTraining
from areal_like.wire.messages.hello import Goodbye, HelloRequired, Ok, Refused, Welcome
from areal_like.wire.messages.producer import ReturnLeases
from tests.attacks.attacker import (
    NULL_GREETING,
    NULL_READY,
    Attacker,
    Tap,
    Trap,
    bytes_accepted,
    exchange,
    leave_with_pings,
    request,
)
from tests.attacks.forgeries import (
    HUGE,
    as_server,
    as_trainer,
    engine_requests,
    failure,
    forged_push,
    forged_samples,
    guesses,
    heartbeat,
    large_messages,
    long_names,
    rank_hello,
    server_hello,
)
from tests.attacks.job import AttackedJob, attacked_job
from tests.attacks.ports import listening_ports
from tests.support.keys import new_keys
from tests.support.launching import TEST_LIMIT_S, processes_of
from tests.support.quick import only_in_chaos

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


Attack = Callable[[Config], Iterable[list[bytes]]]


def large(config: Config) -> Iterable[list[bytes]]:
    """1: as many as the attacker's own queue takes, because nobody reads them."""
    return large_messages(140)


@pytest.mark.parametrize("attack", [guesses, *only_in_chaos(as_trainer), as_server, long_names, large])
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
        for frames in attack(job.config):
            for attacker in attackers:
                attacker.try_send(frames)
        job.wait_status(lambda status: status["refused_handshakes"] >= before + 4, what="refused handshakes")
        assert [attacker.received(wait_s=0.1) for attacker in attackers] == [[]] * 4
    status = job.status()
    assert sorted(peer["name"] for peer in status["peers"]) == ["rollout-0", "trainer-0"]
    assert status["bad_frames"] == status["unregistered_frames"] == 0, "nothing of it was read"
    job.goes_on()
    assert job.log_bytes() - log_bytes < 1 << 20


def test_a_scan_of_all_ports_gets_refusals(job: AttackedJob) -> None:
    """A stranger connects to every listening port of every process of the job.

    A refusal is: no byte; the 64 bytes of a CURVE greeting; HTTP status 400 or 401 with nothing but an error;
    `ok` from /livez and /readyz. Left out are torch's ports, the rendezvous of a weight group and gloo's
    connections, because torch has no authentication for them: test_weight_intruder.py writes to those.
    """
    known = {int(address.rpartition(":")[2]): kind for address, kind in job.addresses().items()}
    ports = listening_ports(processes_of(job.run))
    assert set(known) <= {port.number for port in ports}
    assert {port.host for port in ports} <= {"127.0.0.1", "::1"}
    for port in ports:
        match known.get(port.number):
            case "zmq":
                scan_socket(port.number)
            case "http" | "engine" as kind:
                scan_plane(f"127.0.0.1:{port.number}", has_probes=kind == "http")
            case _:
                owner = job.daemons.get(port.pid)
                assert owner in ("trainer", "rollout_server.engine"), "only torch may listen elsewhere"
    job.goes_on()


def scan_socket(port: int) -> None:
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(4096), NULL_GREETING + NULL_READY):
        answer = exchange(port, sent, wait_s=0.5)
        assert len(answer) <= CURVE_GREETING, answer
        assert not answer[12:] or answer[12:].startswith(b"CURVE".ljust(20, b"\0"))


def scan_plane(address: str, *, has_probes: bool) -> None:
    port = int(address.rpartition(":")[2])
    assert exchange(port, b"", wait_s=0.5) == b""
    for sent in (secrets.token_bytes(4096), NULL_GREETING + NULL_READY):
        answer = exchange(port, sent, wait_s=0.5)
        assert answer == b"" or (answer.startswith(b"HTTP/1.1 400 ") and len(answer) < 500), answer
    for path in (
        "/",
        "/status",
        "/metrics",
        "/metrics/engine",
        "/control/drain",
        "/generate",
        "/docs",
        "/../x",
    ):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            status, body = request(address, method, path)
            assert status == 401
            assert method == "HEAD" or list(json.loads(body)) == ["error"]
    for path in ("/livez", "/readyz"):
        wanted = (200, b"ok") if has_probes else (401, None)
        status, body = request(address, "GET", path)
        assert (status, body if has_probes else None) == wanted


@pytest.mark.parametrize("target", ["buffer", "weights"])
def test_pings_of_strangers_end_no_daemon(job: AttackedJob, target: str) -> None:
    """1: the abort of libzmq, without a heartbeat of our own."""
    for _ in range(5):
        leave_with_pings(int(getattr(job, target).rpartition(":")[2]))
    job.goes_on()


def test_a_servers_key_is_no_trainers(job: AttackedJob) -> None:
    """4, 7: with the values that everything else would be right with."""
    before = job.status()["refused_frames"]
    with job.thief("rollout") as thief:
        for name, rank in (("trainer-0", 0), ("trainer-77", 77)):
            answer = thief.call(rank_hello(job.config, name, rank=rank, incarnation=HUGE))
            assert isinstance(answer, Refused) and answer.field == "key role"
        thief.send(StartTraining(step=0))
        assert thief.next_message() == HelloRequired()
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
        assert [thief.next_message() for _ in range(21)] == [HelloRequired()] * 21
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


@pytest.mark.parametrize(
    "key", ["", "rollout", *only_in_chaos("gpu-7"), "buffer", *only_in_chaos("operator")]
)
def test_only_a_trainer_may_push_weights(job: AttackedJob, key: str) -> None:
    """10: also for the holder of the buffer's key."""
    rollout = job.identity("rollout").public
    identity = job.identity(key) if key else None
    with Trap() as store, Attacker(job.weights, identity=identity, server_key=rollout) as attacker:
        for frames in [*forged_push(store.port), *large_messages(8)]:
            attacker.try_send(frames)
        assert attacker.received(wait_s=1.0) == []
        assert store.heard == [], "the engine connects nowhere"
    job.goes_on()
    assert "forged" not in (job.run / "logs" / "rollout-0.log").read_text()


def test_the_holder_of_a_key_may_send_rubbish(job: AttackedJob) -> None:
    """1, 9: what a stolen key can still send."""
    before = job.status()["bad_frames"]
    with job.thief("gpu-7") as thief:
        for frames in [*large_messages(20), *long_names(job.config)]:
            thief.send_frames(frames)
        job.wait_status(lambda status: status["bad_frames"] > before, what="bad frames")
    job.goes_on()


def test_replayed_connections_are_refused(job: AttackedJob) -> None:
    port = int(job.buffer.rpartition(":")[2])
    hello = server_hello(job.config, "rollout-6")
    with Tap(port) as tap:
        with job.thief("gpu-7", tap.address) as peer:
            assert isinstance(peer.call(hello), Welcome)
            assert isinstance(peer.call(Goodbye()), Ok)
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
    message = ReturnLeases(leases=[1], reason="leaving")
    with job.thief("gpu-7", route=route) as peer:
        assert isinstance(peer.call(server_hello(job.config, "rollout-6")), Welcome)
        peer.send(message, rid=1)
        before = job.status()["refused_frames"]
        with job.thief("rollout", route=route) as thief:
            thief.send(message, rid=1)
            answer = thief.next_message()
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
