"""`areal-like drop` on a running buffer, on the ledger of a stopped one, and with tickets that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.audit.run import audit_run
from launch.cli import main
from tests.chaos.job import check_groups, running_job, train
from tests.support.launching import TEST_LIMIT_S

pytestmark = pytest.mark.timeout(TEST_LIMIT_S)


@pytest.mark.long
def test_dropped_tickets_leave_their_places_to_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {"num_steps": 10, "groups_per_step": 4, "fetch_timeout_s": 600.0}
    buffer = {"lease_timeout_s": 2.0, "overdue": "wait"}
    with running_job(tmp_path, trainer=trainer, buffer=buffer) as job:
        job.produce("rollout-0")
        root = str(job.buffer.paths.root)
        with job.trainer() as link:
            groups = train(link, first=0, last=5)
            bad = [group.ticket_id for group in link.groups(5)][1:3]
        assert main(["drop", root, str(groups[0].ticket_id)]) == 2, "the ticket is trained already"
        assert main(["drop", root, str(bad[0]), "999999"]) == 2, "all or none"
        assert main(["drop", root, str(bad[0])]) == 0
        assert "the running buffer has dropped" in capsys.readouterr().out

        job.buffer.process.kill()
        job.buffer.process.wait()
        assert main(["drop", root, str(bad[1])]) == 0
        assert "a job that is not running" in capsys.readouterr().out
        assert main(["drop", root, str(bad[1])]) == 2, "the ticket is dropped already"

        job.restart_buffer()
        with job.trainer() as link:
            groups += train(link, first=5, last=10)
        check_groups(groups, job.config, first=0, last=10)
        assert not {group.ticket_id for group in groups} & set(bad)
        assert job.buffer.terminate() == (0, "")
        audit = audit_run(job.buffer.paths.root)
        assert audit.is_clean, "\n".join(audit.lines())
        assert audit.drops == {"poison": 2} and audit.tickets["trained"] == 40
