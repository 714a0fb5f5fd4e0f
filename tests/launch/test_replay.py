"""The recording that a replay reads; tests/jobs/test_resumption.py replays that of a real job."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from trainer.replay.recording import Recording


def test_a_run_without_a_ledger_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        Recording(tmp_path)
