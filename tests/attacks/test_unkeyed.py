"""Attacks on a job without keys, by a process of the same machine that knows everything about the job."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from areal_like.failures import FailureKind
from areal_like.wire.messages.hello import Goodbye, Refused, Welcome
from areal_like.wire.messages.producer import Leases
from tests.attacks.attacker import Attacker, bytes_accepted, request
from tests.attacks.forgeries import (
    HUGE,
    absurd_samples,
    engine_requests,
    failure,
    heartbeat,
    large_messages,
    rank_hello,
    server_hello,
    with_long_name,
)
from tests.attacks.job import AttackedJob, attacked_job
from tests.support.launching import TEST_LIMIT_S, areal_like

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.long]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, cache: dict[str, str]) -> Iterator[AttackedJob]:
    """A job without keys. At its end its ledger must hold no number that an attacker has sent."""
    with attacked_job(tmp_path_factory.mktemp("unkeyed"), cache=cache) as job:
        yield job
    file = job.run / "ledger" / "ledger.sqlite3"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT name, value FROM marks WHERE name LIKE 'incarnation:%'").fetchall()
    assert {"incarnation:trainer", "incarnation:rollout-0"} <= {name for name, _ in rows}
    assert max(value for _, value in rows) < 100


@pytest.mark.parametrize("target", ["buffer", "weights"])
def test_large_messages_and_a_sudden_end(job: AttackedJob, target: str) -> None:
    """1: to the buffer and to a rollout server."""
    for _ in range(2):
        with Attacker(getattr(job, target)) as attacker:
            for frames in large_messages(70):
                attacker.send_frames(frames)
    job.goes_on()


@pytest.mark.parametrize("kind", [FailureKind.REWARD, FailureKind.ENGINE])
def test_one_server_cannot_end_the_job_by_failures(job: AttackedJob, kind: FailureKind) -> None:
    """6: a server that fails every sample is put into quarantine."""
    name = f"failing-{kind.value}"
    num_failed = 0
    with Attacker(job.buffer) as attacker:
        welcome = attacker.call(server_hello(job.config, name))
        assert isinstance(welcome, Welcome)
        while "quarantine" not in entry_of(job, name):
            attacker.inbox.clear()
            attacker.send(heartbeat(free=400, version=job.status()["newest_version"]))
            for message in attacker.received(wait_s=0.2):
                for lease in message.leases if isinstance(message, Leases) else ():
                    for index in lease.sample_indices:
                        attacker.send(
                            failure(
                                lease_id=lease.lease_id, ticket_id=lease.ticket_id, index=index, kind=kind
                            )
                        )
                        num_failed += 1
        assert num_failed >= job.config.buffer.max_consecutive_failures
        assert "forged" in entry_of(job, name)["quarantine"]["reason"]
        check_no_leases(job, attacker)
        job.goes_on()
        attacker.call(Goodbye())
    assert job.status()["failed_because"] == ""


def check_no_leases(job: AttackedJob, attacker: Attacker) -> None:
    """Checks that a server in quarantine gets no leases for its free places."""
    version = job.status()["newest_version"]
    attacker.call(heartbeat(free=0, version=version))  # its reply comes after the leases of before
    attacker.inbox.clear()
    attacker.call(heartbeat(free=400, version=version))
    assert not any(isinstance(message, Leases) for message in attacker.received(wait_s=0.5))


def entry_of(job: AttackedJob, name: str) -> dict[str, Any]:
    """The entry of a peer in /status."""
    return next((dict(peer) for peer in job.status()["peers"] if peer["name"] == name), {})


def test_names_that_are_taken(job: AttackedJob) -> None:
    """7, 8: with the largest number, several times."""
    for _ in range(2):
        for hello in (
            rank_hello(job.config, incarnation=HUGE),
            rank_hello(job.config, "trainer-77", rank=77, incarnation=HUGE),
            server_hello(job.config, "rollout-0", incarnation=HUGE),
        ):
            with Attacker(job.buffer) as attacker:
                answer = attacker.call(hello)
                assert isinstance(answer, Refused) and answer.field == "name"
    job.goes_on()
    assert job.status()["counters"]["leases_lost"] == 0


def test_long_names(job: AttackedJob) -> None:
    """9: neither log nor directory grows."""
    before, peers = job.log_bytes(), len(job.status()["peers"])
    with Attacker(job.buffer) as attacker:
        for _ in range(30):
            attacker.send_frames(with_long_name(server_hello(job.config, "x"), num_chars=3_000_000))
        attacker.send_frames(with_long_name(server_hello(job.config, "x"), num_chars=65))
        assert not any(isinstance(message, Welcome) for message in attacker.received(wait_s=0.5))
    job.goes_on()
    assert job.log_bytes() - before < 1 << 20 and len(job.status()["peers"]) == peers


def test_large_bodies(job: AttackedJob) -> None:
    """16: of every daemon, and of an engine."""
    for name, address in (job.planes | {"engine": job.engine}).items():
        before = job.peak_bytes(name)
        for chunked in (False, True):
            num_bytes = bytes_accepted(
                address, "/control/drop", num_bytes=300_000_000, chunked=chunked, headers={}
            )
            assert num_bytes < 20 << 20
        assert job.peak_bytes(name) - before < 32 << 20, name
    job.goes_on()


def test_web_pages_and_rebound_names(job: AttackedJob) -> None:
    """17, 18: of every daemon, and of an engine."""
    for address in (*job.planes.values(), job.engine):
        for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            for method, path in (("POST", "/control/drain"), ("GET", "/status"), ("POST", "/generate")):
                assert request(address, method, path, body=b"{}", headers=headers)[0] == 403
        for host in ("evil.example", f"evil.example:{address.rpartition(':')[2]}"):
            status, body = request(address, "GET", "/status", headers={"Host": host})
            assert status == 421 and b"pid" not in body
    job.goes_on()


def test_an_engine_has_a_key_in_any_case(job: AttackedJob, tmp_path: Path) -> None:
    """11 to 14."""
    for path, body in engine_requests(tmp_path).items():
        for headers in ({}, {"Authorization": "Bearer x"}):
            assert request(job.engine, "POST", path, body=body, headers=headers)[0] == 401
    job.goes_on()


def test_a_server_that_lies(job: AttackedJob) -> None:
    """Absurd rewards, totals and waits: it fails its own samples, is named, and gets no leases."""
    before, name = job.status(), "liar"
    lies = {"stats": {"tokens_generated": 1e17, "busy_s": 1e300}, "waits": {"engine: \x1b[2J": 500.0}}
    with Attacker(job.buffer) as attacker:
        assert isinstance(attacker.call(server_hello(job.config, name)), Welcome)
        while job.status()["counters"]["refusals_invalid"] == before["counters"]["refusals_invalid"]:
            attacker.inbox.clear()
            version = job.status()["newest_version"]
            attacker.send(heartbeat(free=400, version=version))
            for message in attacker.received(wait_s=0.2):
                for lease in message.leases if isinstance(message, Leases) else ():
                    attacker.send(absurd_samples(lease, version=version))
        while "no rollout server sends" not in entry_of(job, name).get("quarantine", {}).get("reason", ""):
            version = job.status()["newest_version"]
            attacker.send(dataclasses.replace(heartbeat(free=400, version=version), **lies))
            attacker.received(wait_s=0.2)
        check_no_leases(job, attacker)
        status = job.wait_status(
            lambda status: name in [cause["name"] for cause in status["why"]["causes"]], what="why"
        )
        assert status["counters"]["tokens_generated"] < 1e9
        shown = "".join(areal_like(verb, str(job.run), cwd=job.run).stdout for verb in ("why", "status"))
        assert name in shown and "\x1b" not in shown
        job.goes_on()
    assert job.status()["failed_because"] == ""
