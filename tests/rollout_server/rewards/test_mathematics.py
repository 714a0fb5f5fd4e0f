"""The reward `math`: what equals what, and what happens to expressions that never end."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.library import mathematics as module
from rollout_server.tasks.base import Completion, Example, Score
from tests.support.waiting import HANG_LIMIT_S

ENDLESS = r"The answer is $9^{9^{9^{9}}}$"


@pytest.fixture(scope="module", autouse=True)
def math_verify() -> None:
    pytest.importorskip("math_verify", reason="needs areal-like[rewards]")


def scored(text: str, answer: Any, **settings: Any) -> Score:
    rewards = make_rewards({"name": "math", "timeout_s": HANG_LIMIT_S, **settings})
    score = rewards.score(Example(prompt="", answer=answer), Completion(text))
    assert isinstance(score, Score)
    return score


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"Thus \boxed{\frac{2}{4}}.", "1/2", 1),
        ("It is 4, no: 5", 5, 1),
        ("It is 5, no: 4", 5, 0),
        (r"$x \in (1, 2)$", "(1,2)", 1),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1),
        (r"\boxed{x=3}", r"\boxed{3}", 1),
        ("#### 1,234", "Half of 2468 is <<2468/2=1234>>1234.\n#### 1,234", 1),
        ("I do not know", "7", 0),
        ("", "7", 0),
        (r"\boxed{" * 200 + "7", "7", 0),
    ],
)
def test_values(text: str, answer: Any, value: float) -> None:
    score = scored(text, answer)
    assert score.value == value and score.parts == {"math": value}
    assert score.metrics["math/timeouts"] == 0


def test_an_endless_comparison_is_0_and_counted() -> None:
    before = signal.getsignal(signal.SIGALRM)
    for limit_s in (0.3, 3.0, 30.0):  # a busy machine parses it late
        score = scored(ENDLESS, "3", timeout_s=limit_s)
        if score.metrics["math/parsed"]:
            break
    assert score.value == 0 and score.metrics == {"math/parsed": 1.0, "math/timeouts": 1.0}
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_it_works_in_an_event_loop_and_in_a_thread() -> None:
    async def both() -> list[float]:
        in_thread = await asyncio.to_thread(scored, "4", 4)
        assert threading.current_thread() is threading.main_thread()
        return [in_thread.value, scored("4", 4).value, scored(ENDLESS, 4, timeout_s=0.2).value]

    assert asyncio.run(both()) == [1, 1, 0]


@pytest.mark.parametrize("answer", ["", None])
def test_an_answer_that_is_none_names_its_row(answer: Any) -> None:
    rewards = make_rewards("math")
    example = Example(prompt="", answer=answer, metadata={"place": "test.jsonl:17"})
    with pytest.raises(RewardError, match=r"cannot parse the answer of test.jsonl:17"):
        rewards.score(example, Completion("4"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    module._library.cache_clear()
    monkeypatch.setattr(module.importlib, "import_module", missing)
    try:
        with pytest.raises(
            ConfigError, match=r"pip install 'areal-like\[rewards\]' \(No module named 'math_v"
        ):
            module.Mathematics().check()
    finally:
        module._library.cache_clear()
    with pytest.raises(ConfigError, match=r"task.reward.timeout_s=0: must be above 0"):
        module.Mathematics(timeout_s=0)
