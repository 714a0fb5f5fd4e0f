"""The conformance suite against a real SGLang."""

from __future__ import annotations

import asyncio

import pytest

from areal_like.config import Config
from areal_like.paths import RunPaths
from tests.support import engine_conformance as conformance
from tests.support import moved_clock
from tests.support.conversation_conformance import conversations_are_exact
from tests.support.engine_harness import Engine, Models

pytestmark = pytest.mark.timeout(480)
PROMPT = conformance.PROMPT


def test_logprobs_and_greedy_match_transformers(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.logprobs_and_greedy_match_transformers(engine, models))


def test_scores_match_transformers(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.scores_match_transformers(engine, models))


def test_stop_and_length(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.stop_and_length(engine, models[0]))


def test_stop_texts_end_a_sequence(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.stop_texts_end_a_sequence(engine, models[0]))


def test_turns_reuse_earlier_turns(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.turns_reuse_what_earlier_turns_computed(engine, models))


def test_conversations_are_exact(engine: Engine, models: Models) -> None:
    asyncio.run(conversations_are_exact(engine, models))


def test_a_time_out_keeps_the_partial_tokens(engine: Engine, models: Models) -> None:
    moved_clock.run(conformance.a_time_out_keeps_the_partial_tokens(engine, models[0]))


def test_progress_shows_in_the_load(engine: Engine) -> None:
    asyncio.run(conformance.progress_shows_in_the_load(engine))


def test_abort_returns_partial_tokens(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.abort_returns_partial_tokens(engine, models[0]))


def test_pause_modes(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.pause_modes(engine, models[0]))


def test_groups_are_created_destroyed_and_created_again(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.groups_are_made_destroyed_and_made_again(engine, models[0]))


def test_recompute_in_flight_is_exact(engine: Engine, models: Models) -> None:
    assert (
        asyncio.run(conformance.versions_across_an_update_in_flight(engine, models, running="recompute"))
        < conformance.TOLERANCE
    )


def test_keep_in_flight_records_versions_with_inexact_logprobs(engine: Engine, models: Models) -> None:
    assert (
        asyncio.run(conformance.versions_across_an_update_in_flight(engine, models, running="keep"))
        > conformance.TOLERANCE
    )


def test_calls_of_a_stranger_are_refused(engine: Engine, config: Config) -> None:
    asyncio.run(conformance.strangers_calls_are_refused(engine))
    log = (RunPaths.of(config).logs / "rollout-0-engine.log").read_text()
    assert engine.api_key not in log and "<API key>" in log


def test_bad_requests_are_refused(engine: Engine) -> None:
    asyncio.run(conformance.bad_requests_are_refused(engine))


def test_update_calls_need_an_open_update_and_a_group(engine: Engine, models: Models) -> None:
    asyncio.run(conformance.update_calls_need_an_open_update_and_a_group(engine, models[0]))


def test_requests_share_decode_steps(engine: Engine) -> None:
    assert asyncio.run(conformance.throughput_of_concurrent_requests(engine)) > 5
