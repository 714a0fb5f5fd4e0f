"""The interpreter that has Harbor; every test of this directory is marked `harbor`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chat_models import APPENDING, chat_tokenizer
from tests.support.engine_harness import Engine, running_engine
from tests.support.scripted_policy import save_chat_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this directory."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.harbor)


@pytest.fixture(scope="session")
def interpreter() -> str:
    """Python of the environment that `make harbor` builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = cache / "areal_like" / "harbor" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with Harbor: make harbor")
    return str(python)


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
