"""The audit on the ledger of a buffer that was killed at work: clean as it is, and each lie that is told about it is found by name."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from areal_like.wire.messages.consumer import GetRunCounters
from launch.cli import main
from launch.commands.audit import audit_run
from tests.chaos.plant import plant, train

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five committed steps, one that is complete, and work in progress."""
    trainer = {"num_steps": 20, "groups_per_step": 4, "fetch_timeout_s": 60.0}
    with plant(tmp_path_factory.mktemp("audit"), trainer=trainer) as job:
        fast = job.produce("rollout-0", capacity=16)
        with job.trainer() as link:
            train(link, first=0, last=5)
            # The slow one would take minutes for step 5.
            job.buffer.wait_status(lambda status: status["tickets"]["batched"] >= 4, timeout_s=40)
            fast.terminate()
            job.produce("rollout-1", sample_s=60.0)
            train(link, first=5, last=6)
            job.buffer.wait_status(lambda status: status["tickets"]["leased"])
        job.buffer.process.kill()
        job.buffer.process.wait()
        return job.buffer.paths.root


@pytest.fixture
def run(killed_run: Path, tmp_path: Path) -> Path:
    """A copy to lie in."""
    return Path(shutil.copytree(killed_run, tmp_path / "run"))


def tell(run: Path, *statements: str) -> None:
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_a_killed_buffers_books_balance(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = audit_run(run)
    assert report.is_clean, "\n".join(report.lines())
    assert report.tickets["trained"] == 20 and report.facts["committed_steps"] == 5
    assert report.tickets["issued"] == sum(
        count for state, count in report.tickets.items() if state != "issued"
    )
    checked = {check.text: check.num_checked for check in report.checks}
    assert all(count for text, count in checked.items() if "tried again" not in text), (
        "every law must have had something to say"
    )
    assert main(["audit", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True


def test_books_balance_when_a_trainer_has_just_gone_back(tmp_path: Path) -> None:
    trainer = {"num_steps": 20, "groups_per_step": 4, "fetch_timeout_s": 60.0}
    with plant(tmp_path, trainer=trainer) as job:
        job.produce("rollout-0", capacity=16)
        with job.trainer() as link:
            train(link, first=0, last=7)
        with job.trainer() as link:
            train(link, first=5, last=5)
            link.call(GetRunCounters(), timeout_s=10)
        job.buffer.process.kill()
        job.buffer.process.wait()
        report = audit_run(job.buffer.paths.root)
    assert report.is_clean, "\n".join(report.lines())
    assert report.facts["rollbacks"] == 1


TRAINED = "(SELECT ticket_id FROM tickets WHERE state = 'trained' ORDER BY 1 LIMIT 1)"
LEASED = "(SELECT ticket_id FROM tickets WHERE state = 'leased' ORDER BY 1 LIMIT 1)"
LIES = {
    "every ticket is in one state": "UPDATE tickets SET reason = 'stale' WHERE ticket_id = 3",
    "no ticket is missing": f"DELETE FROM tickets WHERE ticket_id = {LEASED}",
    "no place of a step is taken twice": "UPDATE tickets SET position = 0 WHERE step = 2 AND position = 1",
    "trained is what was committed": f"UPDATE tickets SET state = 'batched' WHERE ticket_id = {TRAINED}",
    "no step is committed that was not completed": "UPDATE marks SET value = 3 WHERE name = 'trainer_step'",
    "a group that was finished has all": f"DELETE FROM samples WHERE ticket_id = {TRAINED} AND sample_index = 2",
    "no bytes on disk belong to two samples": "UPDATE samples SET offset = 0, segment = (SELECT min(segment) FROM samples) "
    "WHERE sample_index = 1",
    "nothing was trained beyond": f"UPDATE tickets SET max_staleness = -1 WHERE ticket_id = {TRAINED}",
    "versions grow": "UPDATE versions SET parent = version WHERE version = 4",
    "every sample was made by weights": "DELETE FROM versions WHERE version = (SELECT max(newest_version) FROM samples)",
    "leases are of tickets": f"DELETE FROM leases WHERE ticket_id = {LEASED}",
    "no sample is being made twice": "INSERT INTO leases SELECT lease_id + 100000, ticket_id, server, server_incarnation, weights_step, "
    "outstanding FROM leases LIMIT 1",
    "a prompt is tried again once": f"UPDATE tickets SET parent = {TRAINED} WHERE ticket_id = {LEASED}",
    "the counters say": "UPDATE statistics SET value = value + 1 WHERE name = 'tokens_trained'",
    "every step that was committed": f"UPDATE tickets SET state = 'dropped', reason = 'poison' WHERE ticket_id = {TRAINED}",
}


@pytest.mark.parametrize("law", LIES)
def test_every_lie_is_found(run: Path, law: str) -> None:
    tell(run, LIES[law])
    offenders = {check.text: check.offenders for check in audit_run(run).checks}
    assert next(found for text, found in offenders.items() if text.startswith(law)), offenders


def test_a_damaged_trajectory_is_named_with_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as connection:
        ticket_id, segment, offset = connection.execute(
            "SELECT ticket_id, segment, offset FROM tickets JOIN samples USING (ticket_id) WHERE state = 'batched' AND sample_index = 1"
        ).fetchone()
    path = run / "ledger" / "segments" / f"{segment:06d}.seg"
    data = bytearray(path.read_bytes())
    data[offset + 80] ^= 1
    path.write_bytes(data)
    assert main(["audit", str(run)]) == 1
    assert f"sample 1 of ticket {ticket_id} ({path} at {offset})" in capsys.readouterr().out


def test_a_run_without_a_ledger_is_the_users_to_mend(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "ledger")
    assert main(["audit", str(run)]) == 2
    assert "buffer.durability=none" in capsys.readouterr().err


def test_a_ledger_that_is_no_database_is_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / "ledger").glob("ledger.sqlite3*"):
        path.unlink()
    (run / "ledger" / "ledger.sqlite3").write_bytes(b"scrambled " * 100)
    assert main(["audit", str(run)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "cannot be read" in err
