"""Hostile clients of sessions at length, with the chat formats that tests of conversations have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout_server.test_conversation_logprobs import RENDERERS
from tests.support.engine_harness import Engine, running_engine
from tests.support.hostile_sessions import HostileSessions
from tests.support.scripted_policy import save_chat_model

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return save_chat_model(directory / "0", seed=0), save_chat_model(directory / "1", seed=1)


@pytest.fixture(scope="module")
def engine(models: tuple[Path, Path]) -> Iterator[Engine]:
    with running_engine(models[0]) as engine:
        yield engine


@pytest.mark.parametrize("name", list(RENDERERS))
def test_hostile_clients_at_length(name: str, engine: Engine, models: tuple[Path, Path]) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    sessions = HostileSessions(engine, models)
    sessions.play(RENDERERS[name], num_examples=60, seed=seed)
    assert sessions.seen["turns"] > 200 and sessions.seen["joined"] > 0, sessions.seen
