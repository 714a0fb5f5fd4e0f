"""`areal-like run rollout.engine=sglang`: a whole job that pushes weights into SGLang at every step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from rollout_server.policy.engines.sglang.process import find_python
from tests.launch.test_run import SMALL
from tests.sglang.conftest import START_S
from tests.support.launching import launcher, processes_of

pytestmark = pytest.mark.timeout(900)
NUM_STEPS = 20


def test_a_job_on_sglang_from_start_to_summary(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "x"
    # With max_staleness=0 every trained token was sampled by the weights that compute its log-prob again, so
    # the two log-probs must agree.
    settings = (
        *SMALL,
        "model.warm_start_steps=250",
        # SGLang's samples follow no seed, so all rewards of a step may be zero. With an entropy bonus groups
        # without spread are trained on as well.
        "trainer.entropy_coef=1e-6",
        "sampling.group_size=8",
        "trainer.groups_per_step=16",
        "eval.num_prompts=64",
        "rollout.engine=sglang",
        f"rollout.sglang.python={find_python('')}",
        "max_staleness=0",
        "eval.interval=1000",
        f"rollout.start_timeout_s={START_S}",
    )
    try:
        with launcher(*settings, f"trainer.num_steps={NUM_STEPS}", cwd=tmp_path) as process:
            out, err = process.communicate(timeout=850)
        assert (process.returncode, err) == (0, ""), out + err
        summary = json.loads((root / "summary.json").read_text())
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        assert summary["steps"] == len(rows) == NUM_STEPS
        assert summary["max_trained_lag"] == 0 and summary["weights_version"] >= NUM_STEPS
        assert min(row["num_tokens"] for row in rows) > 0 and max(row["mismatch_abs"] for row in rows) < 1e-4
        assert summary["eval_after"] > summary["eval_before"]
        tickets = summary["tickets"]
        assert tickets["trained"] == 16 * NUM_STEPS
        assert tickets["issued"] == sum(count for state, count in tickets.items() if state != "issued")
        pushes = (
            (root / "logs" / "rollout-0-engine.log")
            .read_text()
            .count('POST /update_weight_version HTTP/1.1" 200')
        )
        assert pushes >= NUM_STEPS
    finally:
        left = processes_of(root)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left, "processes of the job outlived it"
