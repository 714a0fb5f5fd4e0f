"""Two jobs with `max_staleness=0` are equal, also if each role of one of them was killed.

To rounding, not to the last bit: an engine that was killed computes the samples that were left in other
batches, so that the last digit of a log-prob differs. Tokens and all else that is no float are the same.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.jobs.test_resumption import SMALL, command, pid_of
from tests.support.launching import TEST_LIMIT_S, finish, launcher, num_steps_done, wait_for_steps

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.chaos]
SETTINGS = (
    *SMALL,
    "max_staleness=0",
    "trainer.num_steps=40",
    "trainer.checkpoint_interval=4",
    "trainer.keep_checkpoints=100",
    "buffer.retain_trajectories=true",
)
ROLES = ("-m trainer ", "-m buffer ", "rollout-0")


def test_a_run_with_kills_equals_one_without(tmp_path: Path, cache: dict[str, str]) -> None:
    command("run", *SETTINGS, cwd=tmp_path, environment=cache)
    root = tmp_path / "runs" / "killed"
    with launcher(*SETTINGS, "name=killed", cwd=tmp_path, environment=cache, is_forked=False) as process:
        for role in ROLES:
            wait_for_steps(num_steps_done(root) + 5, root, process=process)
            os.kill(pid_of(root, role), signal.SIGKILL)
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert "trainer ended (killed by SIGKILL)" in out and "buffer ended (killed by SIGKILL)" in out
    assert "rollout-0 ended (killed by SIGKILL)" in out
    words = ("--against", "killed", "--tolerance", "1e-5", "--json")
    compared = json.loads(command("replay", "x", *words, cwd=tmp_path))
    assert (compared["equal"], compared["last_step"]) == (True, 39), compared
    assert compared["compared"]["tokens"] == compared["compared"]["behavior log-probs"] == 40
    assert compared["compared"]["parameters"] == 10 and compared["not_recorded"] == []
