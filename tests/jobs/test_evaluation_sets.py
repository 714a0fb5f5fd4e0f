"""Evaluation sets with real processes: a buffer that is killed in an evaluation, and a server."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.config import Config
from areal_like.wire.messages.consumer import StartTraining
from areal_like.wire.messages.evaluation import EvalResult, RequestEval, SampleOutcome
from areal_like.wire.messages.hello import Hello
from launch.audit.run import audit_run
from tests.support.buffer_harness import BufferProcess, FakeTrainer, connected, running_buffer, trainer_hello
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S, areal_like
from tests.support.rollout_harness import ServerProcess
from trainer.models.tiny import build_tiny_model

SETS: dict[str, Any] = {
    "plain": {"num_prompts": 12},
    "sampled": {
        "task": {"name": "sort", "seed": 7},
        "num_prompts": 40,
        "num_samples": 6,
        "temperature": 0.8,
        "top_k": 5,
        "max_new_tokens": 40,
    },
}
SETTINGS: dict[str, Any] = {
    "eval": {"num_prompts": 12, "sets": SETS},
    "rollout": {"max_running": 6, "queue_samples": 2},
}


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.long
def test_rewards_that_fail_for_held_out_prompts_end_no_job(tmp_path: Path, cache: dict[str, str]) -> None:
    run = areal_like(
        "run",
        "name=x",
        "model.warm_start_steps=0",
        "task._target_=tests.support.rollout_tasks.FailsHeldOut",
        "trainer.num_steps=2",
        "trainer.groups_per_step=2",
        "eval.num_prompts=2",
        "buffer.max_sample_retries=1",
        cwd=tmp_path,
        environment=cache,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    root = tmp_path / "runs" / "x"
    log = (root / "logs" / "trainer-0.log").read_text()
    assert "training starts without an evaluation of the initial weights: none of the 2 samples" in log
    assert "its last evaluation is missing" in log
    assert audit_run(root).is_clean


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
def test_an_evaluation_survives_the_buffer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=5, swap_prob=0.5)
    with ExitStack() as stack:
        buffer = stack.enter_context(running_buffer(tmp_path, model={"path": str(model)}, **SETTINGS))
        config = buffer.peers_config
        server = ServerProcess(config)
        stack.callback(server.close)
        hello = trainer_hello(config)
        before = asyncio.run(evaluate(buffer, hello, eval_id=1, kills=False))
        asyncio.run(evaluate(buffer, hello, eval_id=2, kills=True))
        killed_at = num_samples_in(config)
        second = BufferProcess(config)
        stack.callback(second.close)
        after = asyncio.run(evaluate(second, hello, eval_id=2, kills=False))
        code, _, errors = server.terminate()
        assert code == 0, errors
        assert second.terminate()[0] == 0

    size = 12 + 40 * 6
    assert size < killed_at < 2 * size, "the buffer was to be killed in the second evaluation"
    assert num_samples_in(config) == 2 * size, "no sample was made twice"
    for name, result in before.items():
        check(result, name)
        for field in ("rewards", "tokens", "outcomes"):  # seeds depend on set, prompt and sample alone
            assert np.array_equal(getattr(result, field), getattr(after[name], field)), (name, field)
    tokens_PS = before["sampled"].tokens.reshape(40, 6)
    assert (tokens_PS.min(axis=1) < tokens_PS.max(axis=1)).any(), "answers to a prompt differ"
    audit = audit_run(buffer.paths.root)
    assert audit.is_clean, "\n".join(audit.lines())


async def evaluate(
    buffer: BufferProcess, hello: Hello, *, eval_id: int, kills: bool
) -> dict[str, EvalResult]:
    """The results of both sets; none if it `kills` the buffer when a part of the samples is there."""
    async with connected(buffer, hello) as link:
        trainer = FakeTrainer(buffer.config, link)
        if eval_id == 1:
            await trainer.call(StartTraining(step=0))
        sets = buffer.config.eval.resolved_sets
        requests = {
            name: RequestEval(
                eval_id=eval_id,
                eval_set=name,
                num_prompts=one.num_prompts,
                num_samples=one.num_samples,
                min_version=0,
            )
            for name, one in sets.items()
        }
        calls = [
            asyncio.ensure_future(trainer.call(request, timeout_s=WAIT_LIMIT_S))
            for request in requests.values()
        ]
        if not kills:
            return dict(zip(requests, await asyncio.gather(*calls), strict=True))
        await asyncio.to_thread(
            buffer.wait_status, lambda status: status["tickets"]["evaluated"] >= 60, timeout_s=WAIT_LIMIT_S
        )
        buffer.process.kill()
        buffer.process.wait()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return {}


def check(result: EvalResult, name: str) -> None:
    one = SETS[name]
    assert (result.eval_set, result.num_prompts) == (name, one["num_prompts"])
    assert result.num_samples == one.get("num_samples", 1)
    assert (result.oldest_version, result.newest_version, result.num_failed) == (0, 0, 0)
    limit = one.get("max_new_tokens", 10)
    assert result.tokens.min() > 0 and result.tokens.max() <= limit
    is_truncated = (result.outcomes & int(SampleOutcome.TRUNCATED)) != 0
    assert (result.tokens[is_truncated] == limit).all() and not is_truncated[result.tokens < limit].any()


def num_samples_in(config: Config) -> int:
    ledger = Path(config.runs_dir) / config.name / "ledger" / "ledger.sqlite3"
    with closing(sqlite3.connect(ledger)) as connection:
        query = "SELECT count(*) FROM tickets JOIN samples USING (ticket_id) WHERE purpose = 'eval'"
        (count,) = connection.execute(query).fetchone()
        return int(count)
