"""The stage `sglang` of `areal-like doctor --gpu`, with a real SGLang on this CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.doctor.gpu.running import run_stages
from launch.doctor.gpu.stages import OK, STAGES, Request
from rollout_server.policy.engines.sglang.process import find_python
from tests.sglang.conftest import START_S

pytestmark = pytest.mark.timeout(480)


def test_log_probs_agree_before_and_after_a_push(tmp_path: Path) -> None:
    stage = replace(STAGES["sglang"], limit_s=START_S)
    request = Request(device="cpu", scratch=str(tmp_path), sglang=find_python(""))
    (result,) = run_stages([stage], request)
    assert result.verdict == OK, (result.verdict, result.measured)
    measured = {name: float(value) for name, value in result.measured.items() if name.startswith("mismatch")}
    assert measured["mismatch_largest_before"] < 1e-4 and measured["mismatch_largest_after"] < 1e-4
    assert float(result.measured["push_moves_logprobs_by"]) > 0.1
