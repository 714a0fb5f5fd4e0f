"""Evaluations between steps: which sets are requested, and in which order their results are recorded."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from areal_like.config import from_mapping
from areal_like.config.evaluation import DEFAULT_SET
from areal_like.errors import EvaluationError
from areal_like.wire.messages.evaluation import EvalResult, RequestEval, SampleOutcome
from trainer.evaluate import Evaluations


class Requests:
    """Stands in the place of a buffer's client: the test answers each request when it wants."""

    def __init__(self) -> None:
        self.futures: dict[tuple[int, str], Future[EvalResult]] = {}

    def submit_call(self, request: RequestEval, *, timeout_s: float) -> Future[EvalResult]:
        return self.futures.setdefault((request.eval_id, request.eval_set), Future())

    def wait(self, future: Future[EvalResult], **limits: Any) -> EvalResult:
        return future.result(timeout=0)

    def answer(self, step: int, eval_set: str, *, outcome: int = 0) -> None:
        self.futures[step, eval_set].set_result(
            EvalResult(
                eval_id=step,
                eval_set=eval_set,
                num_samples=1,
                rewards=np.full(2, float(outcome == 0)),
                tokens=np.full(2, int(outcome == 0), np.int32),
                outcomes=np.full(2, outcome, np.uint8),
                oldest_version=step,
                newest_version=step,
                oldest_step=step,
                newest_step=step,
            )
        )


def test_a_slow_set_does_not_hold_up_the_others() -> None:
    sets: dict[str, dict[str, int]] = {"fast": {}, "slow": {}}
    config = from_mapping({"eval": {"interval": 2, "sets": sets}, "trainer": {"num_steps": 6}})
    requests = Requests()
    rows: list[dict[str, Any]] = []
    evaluations = Evaluations(config, requests, on_row=rows.append)  # type: ignore[arg-type]
    evaluations.start_if_due(step=2, min_version=0)
    requests.answer(2, "fast")
    assert evaluations.poll() == 1.0
    evaluations.start_if_due(step=4, min_version=0)
    assert list(requests.futures) == [(2, "fast"), (2, "slow"), (4, "fast")]
    requests.answer(4, "fast")
    assert evaluations.poll() == 1.0
    requests.answer(2, "slow")
    for name in sets:
        requests.futures[6, name] = Future()
        requests.answer(6, name)
    assert evaluations.run(step=6, min_version=0) == 1.0
    order = [(row["step"], row["set"]) for row in rows]
    assert order == [(2, "fast"), (4, "fast"), (2, "slow"), (6, "fast"), (6, "slow")]


@pytest.mark.parametrize("external", [False, True])
def test_samples_that_no_agent_made_end_no_job(external: bool) -> None:
    task = {"name": "external"} if external else {"name": "sort"}
    requests = Requests()
    evaluations = Evaluations(from_mapping({"task": task}), requests, on_row=lambda row: None)  # type: ignore[arg-type]
    requests.futures[0, DEFAULT_SET] = Future()
    requests.answer(0, DEFAULT_SET, outcome=SampleOutcome.MISSING)
    if external:
        assert evaluations.run(step=0, min_version=0) == 0.0
    else:
        with pytest.raises(EvaluationError, match="none of the 2 samples"):
            evaluations.run(step=0, min_version=0)
