"""A rollout server whose SGLang has a KV cache that is too small for all of its samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_like.wire.messages.producer import SampleDone, ServerState
from tests.sglang.conftest import START_S
from tests.support.rollout_harness import PlayedBuffer, job, serving
from trainer.models.tiny import build_tiny_model

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

RETRACTIONS_EVERY_S = 2.0
NUM_LEASES = 100
GROUP = 8


def stats_after_work(model: Path, directory: Path, *, adapts: bool) -> dict[str, float]:
    """The server's statistics after the same leases."""
    with PlayedBuffer() as buffer:
        rollout = {
            "engine": "sglang",
            "max_running": 32,
            "queue_samples": NUM_LEASES * GROUP,
            "start_timeout_s": START_S,
            "adaptive_concurrency": adapts,
            # SGLang admits by an estimate of what a sequence will need, which counts at most 4096 tokens of
            # its answer. Here it counts 8 of 60, as it does with answers of 32k tokens.
            "sglang": {
                "args": "--max-total-tokens 512",
                "env": {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"},
            },
        }
        config = job(
            directory, port=buffer.port, model_dir=model, sampling={"max_new_tokens": 60}, rollout=rollout
        )
        with serving(config) as server:
            buffer.expect_beat(lambda beat: beat.state is ServerState.SERVING, timeout_s=START_S)
            buffer.grant(*(buffer.lease(1 + i, samples=GROUP, prompt=i) for i in range(NUM_LEASES)))
            buffer.expect(SampleDone, count=NUM_LEASES * GROUP, timeout_s=240)
            idle = buffer.expect_beat(lambda beat: beat.stats["samples_done"] == NUM_LEASES * GROUP)
            # The engine's page of metrics is read every two seconds.
            later_s = idle.stats["idle_s"] + 2 * RETRACTIONS_EVERY_S
            stats = buffer.expect_beat(lambda beat: beat.stats["idle_s"] > later_s).stats
            assert server.terminate()[0] == 0
            return stats


def test_fewer_sequences_are_retracted_with_a_limit(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=0, swap_prob=0.5)
    free, limited = (
        stats_after_work(model, tmp_path / str(adapts), adapts=adapts) for adapts in (False, True)
    )
    assert free["concurrency_limit"] == 32 and limited["concurrency_limit"] < 32
    assert free["retractions"] > 20 and limited["retractions"] < free["retractions"] / 2
    for stats in (free, limited):
        assert stats["prompt_tokens"] > stats["cached_prompt_tokens"] > 0
