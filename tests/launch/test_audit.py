"""The audit of a killed buffer's ledger: it passes unchanged, and every falsification is found."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from areal_like.wire.messages.consumer import GetRunCounters, RequestEval
from buffer.storage import sql
from launch.audit.run import audit_run
from launch.cli import main
from tests.chaos.job import running_job, train
from tests.support.closed_run import CLOSE_AFTER, MAX_STALENESS, make_closed_run
from tests.support.launching import TEST_LIMIT_S
from tests.support.rollout_harness import wait_until
from tests.support.waiting import HANG_LIMIT_S

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five committed steps, one that is complete, and work in progress."""
    trainer = {"num_steps": 20, "groups_per_step": 4, "fetch_timeout_s": 600.0}
    buffer = {"lease_timeout_s": 2.0, "overdue": "wait"}
    with running_job(tmp_path_factory.mktemp("audit"), trainer=trainer, buffer=buffer) as job:
        fast = job.produce("rollout-0", capacity=16)
        with job.trainer() as link:
            link.call(
                RequestEval(eval_id=0, num_prompts=4, num_samples=3, min_version=0), timeout_s=HANG_LIMIT_S
            )
            train(link, first=0, last=5)
            # A slow producer, which would take minutes for step 5, leaves tickets leased.
            job.buffer.wait_status(lambda status: status["tickets"]["batched"] >= 4)
            fast.terminate()
            job.produce("rollout-1", sample_s=3600.0)
            train(link, first=5, last=6)
            # On disk: what the status shows may not be durable yet. Those of the other producer are returned.
            wait_until(lambda: num_leases(job.buffer.paths.root, "rollout-1") > 0)
        job.buffer.process.kill()
        job.buffer.process.wait()
        bound = job.buffer.config.staleness_cap
        rows = [
            json.dumps({"step": step, "max_staleness": bound, "lag_max": min(step, bound)})
            for step in range(6)
        ]
        job.buffer.paths.metrics.write_text("\n".join(rows) + '\n{"step": 6, "max_')
        return job.buffer.paths.root


def num_leases(run: Path, server: str) -> int:
    """Leases of a server on disk."""
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as connection:
        query = "SELECT count(*) FROM leases WHERE server = ?"
        (found,) = connection.execute(query, [server]).fetchone()
    return int(found)


@pytest.fixture
def run(killed_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may falsify."""
    return Path(shutil.copytree(killed_run, tmp_path / "run"))


def execute(run: Path, *statements: str) -> None:
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_the_ledger_of_a_killed_buffer_is_clean(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Long, because the run that this file reads is made first, by a real buffer and its producers."""
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["trained"] == 20 and audit.facts["committed_steps"] == 5
    assert audit.tickets["issued"] == sum(
        count for state, count in audit.tickets.items() if state != "issued"
    )
    checked = {check.text: check.num_checked for check in audit.checks}
    of_closed = ("tried again", "closed group", "of closed groups")
    assert all(count for text, count in checked.items() if not any(part in text for part in of_closed)), (
        "every check must have had rows to check"
    )
    assert audit.promise == "wait: every sample within 2 steps"
    assert main(["audit", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True


def test_a_ledger_of_the_release_before_is_clean(run: Path) -> None:
    execute(
        run,
        # That release kept no samples of an evaluation, of which each ticket had one.
        "DELETE FROM samples WHERE ticket_id IN (SELECT ticket_id FROM tickets WHERE purpose = 'eval')",
        "UPDATE tickets SET num_samples = 1 WHERE purpose = 'eval'",
        "UPDATE statistics SET value = value - 8 WHERE name = 'verdict_accepted'",
        "DROP TABLE evaluations",
        "DROP TABLE settings",
        "DROP TABLE parts",
        *(
            f"ALTER TABLE {table} DROP COLUMN {column}"
            for table, columns in {
                "tickets": ("eval_set", "begin_step", "close_step", "early"),
                "samples": ("truncated", "failure", "token_steps"),
                "failures": ("given_up",),
            }.items()
            for column in columns
        ),
        "UPDATE tickets SET released = 1 WHERE state = 'evaluated'",
        "PRAGMA user_version = 2",
    )
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert (audit.tickets["trained"], audit.tickets["evaluated"]) == (20, 4)


def test_the_ledger_is_clean_after_a_rollback(tmp_path: Path) -> None:
    trainer = {"num_steps": 20, "groups_per_step": 4, "fetch_timeout_s": 600.0}
    with running_job(tmp_path, trainer=trainer) as job:
        job.produce("rollout-0", capacity=16)
        with job.trainer() as link:
            train(link, first=0, last=7)
        with job.trainer() as link:
            train(link, first=5, last=5)
            link.call(GetRunCounters(), timeout_s=HANG_LIMIT_S)
        job.buffer.process.kill()
        job.buffer.process.wait()
        audit = audit_run(job.buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.facts["rollbacks"] == 1


TRAINED = "(SELECT ticket_id FROM tickets WHERE state = 'trained' ORDER BY 1 LIMIT 1)"
LEASED = "(SELECT ticket_id FROM tickets WHERE state = 'leased' ORDER BY 1 LIMIT 1)"
FALSIFICATIONS = {
    "every ticket is in one state": "UPDATE tickets SET reason = 'stale' WHERE ticket_id = 3",
    "no ticket is missing": f"DELETE FROM tickets WHERE ticket_id = {LEASED}",
    "no place of a step is taken twice": "UPDATE tickets SET position = 0 WHERE step = 2 AND position = 1",
    "the tickets of committed steps": f"UPDATE tickets SET state = 'batched' WHERE ticket_id = {TRAINED}",
    "no step is committed before it is complete": "UPDATE marks SET value = 3 WHERE name = 'trainer_step'",
    "a finished group has all": f"DELETE FROM samples WHERE ticket_id = {TRAINED} AND sample_index = 2",
    "no bytes on disk belong to two samples": "UPDATE samples SET offset = 0, "
    "segment = (SELECT min(segment) FROM samples) WHERE sample_index = 1",
    "nothing was trained beyond": f"UPDATE tickets SET max_staleness = -1 WHERE ticket_id = {TRAINED}",
    "the staleness bound of a trained ticket": "UPDATE tickets SET max_staleness = max_staleness + 1 "
    f"WHERE ticket_id = {TRAINED}",
    "every step was trained with the settings": "INSERT INTO settings VALUES "
    "(NULL, 3, 'max_staleness', '0', 'operator', 1.0)",
    "versions increase": "UPDATE versions SET parent = version WHERE version = 4",
    "every sample was generated by weights": "DELETE FROM versions "
    "WHERE version = (SELECT max(newest_version) FROM samples)",
    "every lease is of a leased ticket": f"DELETE FROM leases WHERE ticket_id = {LEASED}",
    "no sample is in two leases": "INSERT INTO leases SELECT lease_id + 100000, ticket_id, server, "
    "server_incarnation, weights_step, outstanding FROM leases LIMIT 1",
    "a prompt is tried again once": f"UPDATE tickets SET parent = {TRAINED} WHERE ticket_id = {LEASED}",
    "an evaluation has one ticket": "UPDATE evaluations SET num_prompts = 5",
    "an evaluation has one": "UPDATE evaluations SET state = 'running'",
    "every completion of an evaluated prompt": "DELETE FROM samples WHERE sample_index = 2 AND ticket_id = "
    "(SELECT first_ticket FROM evaluations)",
    "the counters equal the": "UPDATE statistics SET value = value + 1 WHERE name = 'tokens_trained'",
    "the counters of lengths": "UPDATE statistics SET value = value + 1 WHERE name GLOB 'trained_length_*'",
    "the counters of lengths and failures": "INSERT INTO statistics VALUES ('failed_reward_zero', 3)",
    "versions, tokens and reward of a sample": "UPDATE samples SET reward = reward + 0.5 "
    f"WHERE ticket_id = {TRAINED} AND sample_index = 1",
    "every step that was committed": "UPDATE tickets SET state = 'dropped', reason = 'poison' "
    f"WHERE ticket_id = {TRAINED}",
}


@pytest.mark.parametrize("law", FALSIFICATIONS)
def test_every_falsification_is_found(run: Path, law: str) -> None:
    execute(run, FALSIFICATIONS[law])
    offenders = {check.text: check.offenders for check in audit_run(run).checks}
    assert next(found for text, found in offenders.items() if text.startswith(law)), offenders


@pytest.fixture(scope="module")
def made_closed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen committed steps with `buffer.overdue=close`, and closed groups that are not over."""
    return make_closed_run(tmp_path_factory.mktemp("closed"))[0]


@pytest.fixture
def closed_run(made_closed_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may falsify."""
    return Path(shutil.copytree(made_closed_run, tmp_path / "run"))


def test_a_run_that_closes_groups_is_clean(closed_run: Path) -> None:
    audit = audit_run(closed_run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert audit.tickets["closed"] and audit.tickets["split"]
    of_others = ("tried again", "evaluat")
    assert all(check.num_checked for check in audit.checks if not any(o in check.text for o in of_others))
    bound = f"close after {CLOSE_AFTER} steps: every trained token within {MAX_STALENESS} steps"
    assert audit.promise == bound
    with closing(sqlite3.connect(closed_run / "ledger" / "ledger.sqlite3")) as connection:
        counters = dict(connection.execute("SELECT * FROM statistics"))
    assert all(counters[name] for name in ("tokens_masked", "num_parts_dropped", "samples_early"))


PLACED = "(ticket_id, sample_index) = (SELECT ticket_id, sample_index FROM parts LIMIT 1)"
POSITION = "(SELECT ticket_id FROM tickets WHERE state = 'trained' AND prompt_index = -1 LIMIT 1)"
SPLIT = "(SELECT ticket_id FROM tickets WHERE state = 'split' LIMIT 1)"
FALSIFIED_PARTS = {
    "every ticket is in one state": f"UPDATE tickets SET step = 3 WHERE ticket_id = {SPLIT}",
    "every ticket is in": f"UPDATE tickets SET begin_step = -1 WHERE ticket_id = {SPLIT}",
    "a position of parts has as many": f"DELETE FROM parts WHERE {PLACED}",
    "a position of parts has": f"DELETE FROM samples WHERE {PLACED}",
    "a position of parts": f"UPDATE tickets SET prompt_index = 7 WHERE ticket_id = {POSITION}",
    "a position of": "INSERT OR REPLACE INTO failures "
    "SELECT ticket_id, sample_index, 1, 1 FROM parts LIMIT 1",
    "a position": f"UPDATE tickets SET state = 'dropped', reason = 'poison' WHERE ticket_id = {SPLIT}",
    "every sample of a closed group": f"UPDATE tickets SET state = 'closed' WHERE ticket_id = {SPLIT}",
    "every sample of a closed": "UPDATE tickets SET state = 'split' WHERE ticket_id = "
    "(SELECT ticket_id FROM tickets WHERE state = 'closed')",
    "the ages of a sample's tokens": "UPDATE samples SET num_sampled = num_sampled + 1 "
    "WHERE token_steps != '[]'",
    "nothing was trained beyond": "UPDATE tickets SET max_staleness = 0 WHERE state = 'trained'",
    "the staleness bound of a trained": f"UPDATE tickets SET max_staleness = 3 WHERE ticket_id = {POSITION}",
    "the counters equal the": "UPDATE statistics SET value = value - 1 WHERE name = 'tokens_masked'",
    "the counters equal": "UPDATE statistics SET value = value + 1 WHERE name = 'groups_closed'",
    "the counters": "UPDATE statistics SET value = value + 1 WHERE name = 'num_parts_dropped'",
    "the counters of lengths": "UPDATE statistics SET value = value + 1 "
    "WHERE name GLOB 'groups_trained_solved_*'",
    "versions, tokens and reward of a sample": "UPDATE samples SET token_steps = '[[0,1],[1,2]]' "
    "WHERE token_steps != '[]'",
}


@pytest.mark.parametrize("law", FALSIFIED_PARTS)
def test_every_falsification_of_parts_is_found(closed_run: Path, law: str) -> None:
    execute(closed_run, FALSIFIED_PARTS[law])
    found = [check.offenders for check in audit_run(closed_run).checks if check.text.startswith(law)]
    assert any(found)


@pytest.mark.parametrize("beyond", ["mask", "cap", "ratio"])
def test_lags_of_steps_are_checked_where_age_is_limited(closed_run: Path, beyond: str) -> None:
    config, metrics = closed_run / "config.yaml", closed_run / "metrics.jsonl"
    config.write_text(config.read_text().replace("beyond: mask", f"beyond: {beyond}"))
    execute(closed_run, f"UPDATE settings SET value = '{beyond}' WHERE key = 'staleness.beyond'")
    rows = metrics.read_text().replace(f'"lag_max": {MAX_STALENESS}', f'"lag_max": {MAX_STALENESS + 1}')
    metrics.write_text(rows)
    audit = audit_run(closed_run)
    assert len(offenders_of(closed_run)) == (16 if beyond == "mask" else 0)
    assert ("no limit on the age" in audit.promise) == (beyond != "mask")


def offenders_of(run: Path) -> list[str]:
    return [offender for check in audit_run(run).checks for offender in check.offenders]


def test_each_step_is_judged_by_its_own_settings(run: Path) -> None:
    """Also after settings were changed that the steps before did not have."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("groups_per_step: 4", "groups_per_step: 8"))
    assert offenders_of(run) == []
    added = "INSERT INTO settings VALUES (NULL, {}, '{}', '{}', 'start', 1.0)".format
    execute(run, added(4, "trainer.groups_per_step", 8))
    assert offenders_of(run) == ["step 4: 4 of 8 groups"]
    execute(run, "DELETE FROM settings WHERE key = 'trainer.groups_per_step' AND value = '8'")
    # Steps of a buffer that kept its groups in memory. The first ones may have groups that were made ahead.
    (run / "checkpoints" / "step_000012").mkdir(parents=True)
    assert offenders_of(run)[-2:] == ["step 10: 0 of 4 groups", "step 11: 0 of 4 groups"]
    execute(run, added(6, "buffer.durability", "none"))
    assert offenders_of(run) == []
    execute(run, "INSERT INTO versions VALUES (100, 12, 99, 9)")
    assert offenders_of(run) == ["version 100: parent 99, incarnation 9"]
    execute(run, added(12, "buffer.durability", "process_crash"))
    assert offenders_of(run) == []
    (run / "checkpoints" / "step_000013").mkdir()
    assert offenders_of(run) == ["step 12: 0 of 4 groups"]


def test_empty_ledgers_of_other_shards_are_left_out(run: Path) -> None:
    (run / "ledger-1").mkdir()
    with closing(sqlite3.connect(run / "ledger-1" / "ledger.sqlite3")) as connection:
        sql.migrate(connection, path=run)
    assert offenders_of(run) == []
    with closing(sqlite3.connect(run / "ledger-1" / "ledger.sqlite3")) as connection, connection:
        connection.execute(f"ATTACH '{run / 'ledger' / 'ledger.sqlite3'}' AS whole")
        connection.execute("INSERT INTO tickets SELECT * FROM whole.tickets WHERE ticket_id = 3")
        connection.execute("INSERT INTO marks VALUES ('num_shards', 2), ('shard', 1)")
    assert "ledger-1: shard 1 of 2" in offenders_of(run)


def test_a_damaged_trajectory_is_named_with_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as connection:
        ticket_id, segment, offset = connection.execute(
            "SELECT ticket_id, segment, offset FROM tickets JOIN samples USING (ticket_id) "
            "WHERE state = 'batched' AND sample_index = 1"
        ).fetchone()
    path = run / "ledger" / "segments" / f"{segment:06d}.seg"
    data = bytearray(path.read_bytes())
    data[offset + 80] ^= 1
    path.write_bytes(data)
    assert main(["audit", str(run)]) == 1
    assert f"sample 1 of ticket {ticket_id} ({path} at {offset})" in capsys.readouterr().out


def test_a_run_without_a_ledger_is_the_users_mistake(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
