from pathlib import Path

import pytest


@pytest.fixture
def may_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Environments and rewards that are `held` wait in their processes until the test makes this file."""
    monkeypatch.setenv("MAY_GO_ON", str(tmp_path / "may_go_on"))
    return tmp_path / "may_go_on"
