"""What an operator has changed, on its way to all ranks; and the log level, to every daemon."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from areal_like.runtime import logs
from areal_like.wire.messages.consumer import StepSettings
from tests.support.buffer_harness import job
from trainer.leader import NUM_SHARED, configured, received, shared


@pytest.mark.parametrize("lr", [0.0, 1e-5, 0.1, 5e-324, 1.7976931348623157e308])
def test_all_ranks_get_the_rate_to_the_last_bit(lr: float) -> None:
    settings = StepSettings(
        step=3, lr=lr, eval_interval=5, max_staleness=1, evaluate=True, checkpoint=lr > 0.05
    )
    assert received(shared(settings)) == (lr, lr > 0.05)
    assert len(shared(settings)) == len(shared(None)) == NUM_SHARED


def test_a_trainer_without_evaluations_says_so(tmp_path: Path) -> None:
    config = job(tmp_path, eval={"num_prompts": 0}, trainer={"num_steps": 6, "groups_per_step": 4, "lr": 0.1})
    assert configured(config) == {"trainer.lr": "0.1", "eval.interval": "0", "daemon.log_level": "INFO"}


def test_a_level_is_followed_and_left_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = root.level
    monkeypatch.setattr(logs, "_own_level", "INFO")
    try:
        root.setLevel("INFO")
        for level, wanted in (("DEBUG", logging.DEBUG), ("", logging.INFO), ("ERROR", logging.ERROR)):
            caplog.clear()
            logs.follow_level(level)
            logs.follow_level(level)
            assert root.level == wanted
            assert len(caplog.messages) == 1, "said once, and before it would be left out"
        monkeypatch.setattr(logs, "_own_level", "")
        logs.follow_level("")
        assert root.level == logging.ERROR
    finally:
        root.setLevel(before)
