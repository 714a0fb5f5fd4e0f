"""transformers as reference for the log-probs of what a framework's run has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_harness import load_model


@pytest.fixture(scope="module")
def reference(models: tuple[Path, Path]) -> Any:
    return load_model(models[0])
