"""Rewards of the library in real worker processes: what hangs, raises or lies costs its own sample only."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import RewardError, RewardTimeoutError
from rollout_server.tasks.base import Completion
from tests.support.judge_server import Answer, judge_server
from tests.support.waiting import HANG_LIMIT_S
from tests.support.workers import reward_pool

TASK = "tests.support.library_rewards.Rewarded"
USERS = "tests.support.library_rewards"


@pytest.fixture(autouse=True)
def workers_find_this_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def outcomes(
    spec: Any, *texts: str, timeout_s: float = HANG_LIMIT_S, concurrency: int = 1, **task: Any
) -> list[Any]:
    """Scores or errors, in order."""

    async def body() -> list[Any]:
        async with reward_pool(
            {"_target_": TASK, "reward_spec": spec, **task},
            sandbox="rlimits",
            timeout_s=timeout_s,
            concurrency=concurrency,
        ) as pool:
            asked = (pool.score(split="train", index=0, completion=Completion(text)) for text in texts)
            answers = await asyncio.gather(*asked, return_exceptions=True)
            return [one if isinstance(one, Exception) else one.score for one in answers]

    return asyncio.run(body())


@pytest.mark.parametrize("function", ["misbehaves", "misbehaves_later"])
def test_a_part_that_misbehaves_fails_its_own_sample(function: str) -> None:
    spec = ["exact", {"name": f"{USERS}.{function}", "weight": 2.0, "part": "odd"}]
    texts = ("4", "nan", "inf", "raise", "rubbish", "5")
    right, nan, inf, raised, rubbish, wrong = outcomes(spec, *texts, concurrency=4)
    assert right.parts == {"exact": 1.0, "odd": 1.0} and right.value == 2.0
    assert wrong.parts == {"exact": 0.0, "odd": 1.0}
    for error in (nan, inf, raised, rubbish):
        assert type(error) is RewardError
    assert "reward odd: reward() must be a finite number" in str(nan) and "no such move" in str(raised)
    (hung,) = outcomes(spec, "hang", timeout_s=1.0, concurrency=4)
    assert type(hung) is RewardTimeoutError


def test_a_catastrophic_pattern_meets_the_time_limit() -> None:
    (hung,) = outcomes({"name": "regex", "pattern": r"(a+)+$"}, "a" * 40 + "b", timeout_s=1.0)
    assert type(hung) is RewardTimeoutError


@pytest.mark.long
def test_math_code_and_a_judge_together() -> None:
    pytest.importorskip("math_verify", reason="needs areal-like[rewards]")
    with judge_server(Answer(), Answer(status=400, body=b"no")) as server:
        spec = [
            {"name": "math", "timeout_s": 30.0},
            {"name": "code", "weight": 0.5, "tests_key": "tests", "needs_fence": True, "timeout_s": 60.0},
            {"name": "judge", "url": server.url, "rubric": "Is it polite?", "weight": 0.1},
        ]
        row = {"tests": ["assert x == 4"]}
        (both,) = outcomes(spec, "```\nx = 4\n```\nIt is 4.", row=row)
        endless, refused = outcomes(
            [{"name": "math", "timeout_s": 1.0}, spec[1]], r"$9^{9^{9^9}}$", "5", row=row
        )
        (failed,) = outcomes(spec, "4, please", row=row)
    assert both.parts == pytest.approx({"math": 1.0, "code": 0.5, "judge": 0.07})
    assert both.metrics["code/passed"] == 1 and both.metrics["judge/calls"] == 1
    assert endless.value == 0 and endless.metrics["math/timeouts"] == 1 and refused.value == 0
    assert type(failed) is RewardError and "HTTP status 400 (no)" in str(failed)


@pytest.mark.parametrize("function", ["seconds_left", "seconds_left_later"])
def test_a_reward_knows_the_time_that_is_left(function: str) -> None:
    """A slow judge must fail before the limit (test_judge.py): a time-out counts as reward 0."""
    for found in outcomes(f"{USERS}.{function}", "a", "b", concurrency=2):
        assert 0 < found.value <= HANG_LIMIT_S
