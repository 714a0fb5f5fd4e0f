"""Adapters loaded by a real SGLang: log-probs against peft, several versions at a time, and unloading.

On a CPU it needs a small change from outside, see unpinned/sitecustomize.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping
from rollout_server.policy.engines.sglang.process import find_python
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import SglangClient
from rollout_server.weights.adapter_folder import SglangAdapterUpdate
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.sglang.conftest import START_S, running_sglang
from tests.support.adapter_pushes import held, push, pushing, serving
from tests.support.adapters import ALPHA, RANK, make_adapter
from tests.support.engine_conformance import PROMPT, until_running
from tests.support.engine_harness import TOLERANCE, VOCAB, error_of, load_model, sample, save_model

pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SGLang's interpreter, which imports unpinned/sitecustomize.py."""
    script = tmp_path_factory.mktemp("bin") / "python"
    change = Path(__file__).parent / "unpinned"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={change} exec {find_python("")} "$@"\n')
    script.chmod(0o700)
    return script


@pytest.fixture(scope="module")
def config(path: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return from_mapping(
        {
            "runs_dir": str(tmp_path_factory.mktemp("runs")),
            "model": {"path": str(path), "lora": {"rank": RANK, "alpha": ALPHA}},
            "max_staleness": 1,
            "weights": {"lora": "adapter", "update_mode": "drain"},
            "rollout": {
                "engine": "sglang",
                "max_running": 16,
                "start_timeout_s": START_S,
                "sglang": {"python": str(python)},
            },
        }
    )


@pytest.fixture(scope="module")
def client_of_engine(config: Config, path: Path) -> Iterator[tuple[str, str]]:
    """URL and key of an SGLang that a rollout server's code has started for adapters."""
    with running_sglang(config, path) as (client, process):
        yield client.base_url, process.api_key


def test_samples_have_the_log_probs_of_their_adapter(
    client_of_engine: tuple[str, str], config: Config, path: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter(path, seed=seed) for seed in (1, 2, 3)]
    url, key = client_of_engine

    async def main() -> None:
        strategy = SglangAdapterUpdate(
            model=str(path),
            shapes=CheckpointShapes.of(str(path)),
            directory=tmp_path / "adapters",
            num_slots=config.num_adapters,
            dtype="float32",
            gate=GenerationGate(),
        )
        async with (
            SglangClient(url, vocab_size=VOCAB, api_key=key) as client,
            serving(client, strategy, base=adapters[0].header.base) as server,
            pushing(update_mode="drain") as broadcaster,
        ):
            generation = await sample(client, PROMPT, 12)
            assert error_of(load_model(path), PROMPT, generation) < TOLERANCE
            running = []
            for version, adapter in enumerate(adapters, 1):
                outcome = await push(broadcaster, held(adapter), server, version=version)
                assert outcome.activated.keys() == {"rollout-0"}, outcome.failed
                running.append(asyncio.ensure_future(sample(client, PROMPT, 300)))
                await until_running(client, 1)
                generation = await sample(client, PROMPT, 12)
                assert set(generation.versions.tolist()) == {version}
                assert error_of(adapter.model, PROMPT, generation) < TOLERANCE
                tokens = [*PROMPT, *generation.output_ids.tolist()]
                scores, scored = await client.score(tokens, first=len(PROMPT))
                assert scored == version
                assert abs(generation.logprobs - scores).max() < TOLERANCE
            for version, (future, adapter) in enumerate(zip(running, adapters, strict=True), 1):
                generation = await future
                assert set(generation.versions.tolist()) == {version}
                assert error_of(adapter.model, PROMPT, generation) < TOLERANCE
            while [folder.name for folder in (tmp_path / "adapters").iterdir()] != ["v3"]:
                await asyncio.sleep(0.05)  # the others are unloaded

    asyncio.run(main())
