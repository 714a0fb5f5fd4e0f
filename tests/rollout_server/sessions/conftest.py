"""A real engine for sessions, and a second model to push to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine_harness import Engine, running_engine
from tests.support.scripted_policy import save_chat_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return save_chat_model(directory / "0", seed=0), save_chat_model(directory / "1", seed=1)


@pytest.fixture(scope="module")
def engine(models: tuple[Path, Path]) -> Iterator[Engine]:
    with running_engine(models[0]) as engine:
        yield engine
