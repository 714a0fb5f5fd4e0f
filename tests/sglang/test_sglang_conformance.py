"""The conformance suite against a real SGLang."""

from __future__ import annotations

import asyncio

import pytest

from areal_like.config import Config
from areal_like.paths import RunPaths
from tests.support import engine_conformance as conformance
from tests.support.engine_harness import Engine, Models

pytestmark = pytest.mark.timeout(480)


@pytest.mark.parametrize("check", conformance.SUITE, ids=lambda check: check.__name__)
def test_conformance(engine: Engine, models: Models, check: conformance.Check) -> None:
    conformance.run(check, engine, models)


def test_the_log_hides_the_key(engine: Engine, models: Models, config: Config) -> None:
    asyncio.run(conformance.strangers_calls_are_refused(engine, models))
    log = (RunPaths.of(config).logs / "rollout-0-engine.log").read_text()
    assert engine.api_key not in log and "<API key>" in log


def test_requests_share_decode_steps(engine: Engine) -> None:
    assert asyncio.run(conformance.throughput_of_concurrent_requests(engine)) > 5
