"""Fixtures of the engine's tests: two saved models, and an engine process that holds the first.

One engine serves all tests of a module, because its start takes seconds. Every test leaves it generating.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine_harness import Engine, Models, running_engine, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[Engine]:
    with running_engine(models[0]) as engine:
        yield engine
