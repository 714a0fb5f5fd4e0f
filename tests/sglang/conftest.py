"""Fixtures: one real SGLang, shared by all tests because it takes half a minute to start.

Every test leaves it generating.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.sglang.process import SglangProcess
from tests.support.engine_harness import CONTEXT, VOCAB, Engine, Models, save_models, store_tied_head

START_S = 400.0
"""Time limit of the start; it takes half a minute on two quiet cores."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Marks every test of this directory `sglang`, so that none of them runs in the quick suite.

    Those with the shared engine come last, because an idle SGLang keeps a core busy.
    """
    ours = {item for item in items if Path(__file__).parent in item.path.parents}
    for item in ours:
        item.add_marker(pytest.mark.sglang)
    yield
    items.sort(key=lambda item: item in ours and "engine" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The first has its tied head in its file, as Qwen3-1.7B has on the hub; pushes leave it out."""
    models = save_models(tmp_path_factory.mktemp("models"), "llama")
    store_tied_head(models[0])
    return models


@pytest.fixture(scope="session")
def config(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return from_mapping(
        {
            "runs_dir": str(tmp_path_factory.mktemp("runs")),
            "model": {"path": str(models[0])},
            "rollout": {"engine": "sglang", "max_running": 16, "start_timeout_s": START_S},
        }
    )


@contextlib.contextmanager
def running_sglang(config: Config, path: Path) -> Iterator[tuple[EngineClient, SglangProcess]]:
    """An SGLang that the code of a rollout server has started, and its closed client."""
    process = SglangProcess(
        config,
        name="rollout-0",
        model=str(path),
        context_tokens=CONTEXT,
        max_positions=CONTEXT,
        vocab_size=VOCAB,
    )

    async def start() -> EngineClient:
        async with await process.start(version=0) as client:
            return client

    client = asyncio.run(start())
    try:
        yield client, process
        assert process.is_running, "SGLang died during the tests"
    finally:
        asyncio.run(process.stop())


@pytest.fixture(scope="session")
def engine(config: Config, models: Models) -> Iterator[Engine]:
    """SGLang, started by the code that a rollout server uses."""
    with running_sglang(config, models[0]) as (client, process):
        yield Engine(
            url=client.base_url, path=models[0], kind="sglang", pid=process.pid, api_key=process.api_key
        )
