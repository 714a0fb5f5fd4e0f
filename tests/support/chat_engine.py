"""Fixtures: an engine process with a tiny chat model, for tests of external agents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chat_models import APPENDING, chat_tokenizer
from tests.support.engine_harness import Engine, running_engine
from tests.support.scripted_policy import save_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with its tokenizer."""
    path = save_chat_model(tmp_path_factory.mktemp("model") / "0")
    chat_tokenizer(APPENDING).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with running_engine(model) as engine:
        yield engine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
